"""Accounts, IAM tokens, authorized keys and roles.

As in the cloud, tokens look like ``t1.…`` and live 12 hours at most; a JWT is signed with PS256 by an authorized key
and lives an hour at most; roles in a project are viewer < developer < editor < admin.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import hashlib
import secrets
import string
import threading
import time
from typing import TYPE_CHECKING, Any

import jwt as pyjwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Audience of a JWT, as in the IAM documentation ("Get an IAM token for a service account").
JWT_AUDIENCE = "https://iam.api.cloud.yandex.net/iam/v1/tokens"
#: Longest life of a JWT, seconds.
JWT_MAX_LIFETIME = 3600
#: How far the clocks of client and server may differ, seconds.
CLOCK_SKEW = 60.0
#: Roles in a project, weakest first.
ROLES = ("viewer", "developer", "editor", "admin")

#: Account of the current call; set by the interceptor before the handler runs.
current_subject: contextvars.ContextVar[str | None] = contextvars.ContextVar("current_subject", default=None)


class Unauthenticated(Exception):
    """The credential is missing, unknown, expired, revoked or malformed."""


def new_id(prefix: str) -> str:
    """Return a new resource id like the cloud's: 20 characters of ``[0-9a-z]``."""
    alphabet = string.ascii_lowercase + string.digits
    return prefix + "".join(secrets.choice(alphabet) for _ in range(20 - len(prefix)))


def fingerprint(token: str) -> str:
    """Return a short hash that identifies a token without revealing it."""
    return hashlib.sha256(token.encode()).hexdigest()[:16] if token else ""


@dataclasses.dataclass
class Account:
    """A service account or a user."""

    id: str
    name: str
    kind: str  # "service_account" or "user"


@dataclasses.dataclass
class Token:
    """An issued IAM token; ``expires_at`` in seconds since the epoch."""

    subject: str
    expires_at: float
    revoked: bool = False


class Iam:
    """Accounts, their credentials and their roles. Thread-safe.

    :param project_id: project in which the default service account gets its role.
    :param token_lifetime: lifetime of new tokens, seconds; may be changed at any time.
    :param default_role: role of the default service account in that project.
    """

    def __init__(
        self, project_id: str = "", *, token_lifetime: float = 12 * 3600.0, default_role: str = "developer"
    ) -> None:
        self._lock = threading.RLock()
        self.token_lifetime = token_lifetime
        #: Accepted audiences of JWTs besides the service's own; `yandexcloud` names the endpoint it was given.
        self.audiences: tuple[str, ...] = ()
        self._accounts: dict[str, Account] = {}
        self._tokens: dict[str, Token] = {}
        self._keys: dict[str, dict[str, str]] = {}
        self._oauth_tokens: dict[str, str] = {}
        self._roles: dict[tuple[str, str], str] = {}
        self._impersonations: set[tuple[str, str]] = set()
        self.default_service_account_id = self.add_service_account("default")
        if project_id:
            self.set_role(self.default_service_account_id, project_id, default_role)

    # Accounts and roles

    def _add_account(self, name: str, kind: str) -> str:
        account = Account(new_id("aje"), name, kind)
        with self._lock:
            self._accounts[account.id] = account
        return account.id

    def add_service_account(self, name: str) -> str:
        """Create a service account and return its id."""
        return self._add_account(name, "service_account")

    def add_user(self, name: str) -> str:
        """Create a user and return its id."""
        return self._add_account(name, "user")

    def accounts(self) -> list[Account]:
        """Return all service accounts and users."""
        with self._lock:
            return [dataclasses.replace(account) for account in self._accounts.values()]

    def _account(self, subject: str) -> Account:
        try:
            return self._accounts[subject]
        except KeyError:
            raise KeyError(f"There is no account {subject!r}.") from None

    def set_role(self, subject: str, project_id: str, role: str | None) -> None:
        """Set the role of an account in a project; None removes it.

        :raises KeyError: there is no such account.
        :raises ValueError: there is no such role.
        """
        if role is not None and role not in ROLES:
            raise ValueError(f"role={role!r}: must be one of {', '.join(ROLES)}, or None.")
        with self._lock:
            self._account(subject)
            if role is None:
                self._roles.pop((subject, project_id), None)
            else:
                self._roles[subject, project_id] = role

    def role_of(self, subject: str, project_id: str) -> str | None:
        """Return the role of an account in a project, None if it is not a member."""
        with self._lock:
            return self._roles.get((subject, project_id))

    def allows(self, subject: str | None, project_id: str, role: str) -> bool:
        """Return whether an account has this role or a stronger one in a project."""
        held = self.role_of(subject, project_id) if subject else None
        return held is not None and ROLES.index(held) >= ROLES.index(role)

    # IAM tokens

    def issue_token(self, subject: str, lifetime: float | None = None) -> str:
        """Issue an IAM token of an account.

        :param lifetime: seconds; None for ``token_lifetime``.
        :raises KeyError: there is no such account.
        """
        token = "t1." + secrets.token_urlsafe(48)
        with self._lock:
            self._account(subject)
            seconds = self.token_lifetime if lifetime is None else lifetime
            self._tokens[token] = Token(subject, time.time() + seconds)
        return token

    def expires_at(self, token: str) -> float:
        """Return when an issued token expires, seconds since the epoch."""
        with self._lock:
            return self._tokens[token].expires_at

    def subject_of(self, token: str) -> str:
        """Return the account of an IAM token.

        :raises Unauthenticated: the token is missing, unknown, revoked or expired.
        """
        if not token:
            raise Unauthenticated("The authorization token is missing.")
        with self._lock:
            known = self._tokens.get(token)
        if known is None:
            raise Unauthenticated("The token is invalid.")
        if known.revoked:
            raise Unauthenticated("The token has been revoked.")
        if known.expires_at <= time.time():
            raise Unauthenticated("The token has expired.")
        return known.subject

    def revoke(self, token: str | None = None, subject: str | None = None) -> int:
        """Revoke one token, all tokens issued to an account so far, or all tokens; return how many.

        :raises KeyError: there is no such token.
        """
        with self._lock:
            if token is not None and token not in self._tokens:
                raise KeyError("There is no such token.")
            revoked = 0
            for value, known in self._tokens.items():
                if (token is None or value == token) and (subject is None or known.subject == subject):
                    revoked += not known.revoked
                    known.revoked = True
            return revoked

    # Authorized keys, OAuth, impersonation

    def create_key(self, service_account_id: str) -> dict[str, str]:
        """Create an authorized key; return the JSON that ``yc iam key create`` writes to a file.

        :raises KeyError: there is no such account.
        :raises ValueError: the account is a user.
        """
        if self._account(service_account_id).kind != "service_account":
            raise ValueError(
                f"service_account_id={service_account_id!r}: is a user; only service accounts have authorized keys."
            )
        private_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        key_id = new_id("aje")
        public = private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        private = private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        known = {
            "id": key_id,
            "service_account_id": service_account_id,
            "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z"),
            "key_algorithm": "RSA_2048",
            "public_key": public.decode(),
        }
        with self._lock:
            self._keys[key_id] = known
        # Real key files have this line before the PEM block, so readers must handle it.
        notice = f"PLEASE DO NOT REMOVE THIS LINE! Yandex.Cloud SA Key ID <{key_id}>\n"
        return {**known, "private_key": notice + private.decode()}

    def delete_key(self, key_id: str) -> None:
        """Delete an authorized key; JWTs signed with it are rejected from then on.

        :raises KeyError: there is no such key.
        """
        with self._lock:
            if key_id not in self._keys:
                raise KeyError(f"There is no authorized key {key_id!r}.")
            del self._keys[key_id]

    def exchange_jwt(self, jwt: str) -> str:
        """Exchange a JWT signed with an authorized key for an IAM token.

        :raises Unauthenticated: the JWT is invalid.
        """
        try:
            key_id = pyjwt.get_unverified_header(jwt).get("kid")
            with self._lock:
                key = self._keys.get(key_id or "")
            if key is None:
                raise Unauthenticated(f"Unknown key id {key_id!r}.")
            claims: dict[str, Any] = pyjwt.decode(
                jwt,
                key["public_key"],
                algorithms=["PS256"],
                audience=[JWT_AUDIENCE, *self.audiences],
                issuer=key["service_account_id"],
                leeway=CLOCK_SKEW,
                options={"require": ["iss", "aud", "iat", "exp"]},
            )
        except pyjwt.PyJWTError as error:
            raise Unauthenticated(f"JWT is invalid: {error}") from error
        if claims["exp"] - claims["iat"] > JWT_MAX_LIFETIME:
            raise Unauthenticated(f"JWT is invalid: it lives longer than {JWT_MAX_LIFETIME} seconds.")
        return self.issue_token(key["service_account_id"])

    def add_oauth_token(self, user: str) -> str:
        """Create an OAuth token of a user.

        :param user: id from :meth:`add_user`.
        :raises KeyError: there is no such account.
        :raises ValueError: the account is a service account.
        """
        if self._account(user).kind != "user":
            raise ValueError(f"user={user!r}: is a service account; only users have OAuth tokens.")
        token = "y0_" + secrets.token_urlsafe(40)
        with self._lock:
            self._oauth_tokens[token] = user
        return token

    def exchange_oauth(self, token: str) -> str:
        """Exchange an OAuth token for an IAM token.

        :raises Unauthenticated: the OAuth token is unknown.
        """
        with self._lock:
            user = self._oauth_tokens.get(token)
        if user is None:
            raise Unauthenticated("OAuth token is invalid or expired.")
        return self.issue_token(user)

    def allow_impersonation(self, caller: str, service_account_id: str) -> None:
        """Allow an account to create tokens of a service account (role ``iam.serviceAccounts.tokenCreator``).

        :raises KeyError: there is no such account.
        """
        with self._lock:
            self._account(caller)
            self._account(service_account_id)
            self._impersonations.add((caller, service_account_id))

    def impersonate(self, caller: str, service_account_id: str) -> str:
        """Issue an IAM token of a service account to another account.

        :raises KeyError: there is no such service account.
        :raises PermissionError: the caller may not impersonate it.
        """
        with self._lock:
            self._account(service_account_id)
            if (caller, service_account_id) not in self._impersonations:
                raise PermissionError(f"{caller} may not create tokens of service account {service_account_id}.")
        return self.issue_token(service_account_id)

    # Restarts

    def to_json(self) -> dict[str, Any]:
        """Return everything that must survive a restart as JSON values; private keys are not kept."""
        with self._lock:
            return {
                "token_lifetime": self.token_lifetime,
                "default_service_account_id": self.default_service_account_id,
                "accounts": [dataclasses.asdict(account) for account in self._accounts.values()],
                "tokens": {value: dataclasses.asdict(known) for value, known in self._tokens.items()},
                "keys": [dict(key) for key in self._keys.values()],
                "oauth_tokens": dict(self._oauth_tokens),
                "roles": [[subject, project, role] for (subject, project), role in self._roles.items()],
                "impersonations": sorted(list(pair) for pair in self._impersonations),
            }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Iam:
        """Restore from the values of :meth:`to_json`."""
        iam = cls(token_lifetime=state["token_lifetime"])
        iam.default_service_account_id = state["default_service_account_id"]
        iam._accounts = {account["id"]: Account(**account) for account in state["accounts"]}
        iam._tokens = {value: Token(**known) for value, known in state["tokens"].items()}
        iam._keys = {key["id"]: dict(key) for key in state["keys"]}
        iam._oauth_tokens = dict(state["oauth_tokens"])
        iam._roles = {(subject, project): role for subject, project, role in state["roles"]}
        iam._impersonations = {(caller, target) for caller, target in state["impersonations"]}
        return iam
