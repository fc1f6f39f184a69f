"""Accounts and tokens, and the IAM token service over a real socket."""

from __future__ import annotations

import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import jwt as pyjwt
import pytest
from yandex.cloud.iam.v1 import iam_token_service_pb2 as messages
from yandex.cloud.iam.v1 import iam_token_service_pb2_grpc as stubs

from datasphere_emulator.faults import Faults
from datasphere_emulator.grpc_handlers import IamTokenHandlers
from datasphere_emulator.iam import JWT_AUDIENCE, Iam, Unauthenticated
from datasphere_emulator.interceptor import JournalInterceptor
from datasphere_emulator.journal import Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROJECT = "bt1projectprojectpro"


@asynccontextmanager
async def served(iam: Iam, journal: Journal | None = None) -> AsyncIterator[stubs.IamTokenServiceStub]:
    interceptor = JournalInterceptor(journal or Journal(), Faults(), iam)
    server = grpc.aio.server(interceptors=[interceptor])
    stubs.add_IamTokenServiceServicer_to_server(IamTokenHandlers(iam), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield stubs.IamTokenServiceStub(channel)
    finally:
        await server.stop(None)


def signed(key: dict[str, str], **changes: Any) -> str:
    """A JWT as the IAM documentation describes it."""
    now = int(time.time())
    header = {"kid": changes.pop("kid", key["id"])}
    algorithm = changes.pop("algorithm", "PS256")
    claims = {"iss": key["service_account_id"], "aud": JWT_AUDIENCE, "iat": now, "exp": now + 3600, **changes}
    private_key = key["private_key"].split("\n", 1)[1]
    return pyjwt.encode(claims, private_key, algorithm=algorithm, headers=header)


def test_tokens_belong_to_their_account_and_expire():
    iam = Iam(PROJECT)
    subject = iam.default_service_account_id
    assert len(subject) == 20
    assert subject.startswith("aje")
    token = iam.issue_token(subject)
    assert token.startswith("t1.")
    assert iam.subject_of(token) == subject
    assert iam.expires_at(token) == pytest.approx(time.time() + 12 * 3600, abs=5)
    iam.token_lifetime = 100
    assert iam.expires_at(iam.issue_token(subject)) == pytest.approx(time.time() + 100, abs=5)
    with pytest.raises(Unauthenticated, match="expired"):
        iam.subject_of(iam.issue_token(subject, lifetime=0))
    with pytest.raises(Unauthenticated, match="invalid"):
        iam.subject_of("t1.somebody-made-this-up")
    with pytest.raises(Unauthenticated, match="missing"):
        iam.subject_of("")


def test_revoking_hits_the_tokens_known_so_far():
    iam = Iam(PROJECT)
    subject = iam.default_service_account_id
    other = iam.add_service_account("other")
    first, second, others = iam.issue_token(subject), iam.issue_token(subject), iam.issue_token(other)
    assert iam.revoke(token=first) == 1
    with pytest.raises(Unauthenticated, match="revoked"):
        iam.subject_of(first)
    assert iam.subject_of(second) == subject
    assert iam.revoke(subject=subject) == 1
    with pytest.raises(Unauthenticated):
        iam.subject_of(second)
    assert iam.subject_of(others) == other
    assert iam.subject_of(iam.issue_token(subject)) == subject


def test_roles_are_ordered_and_can_be_taken_away():
    iam = Iam(PROJECT)
    subject = iam.default_service_account_id
    assert iam.role_of(subject, PROJECT) == "developer"
    assert iam.allows(subject, PROJECT, "viewer")
    assert iam.allows(subject, PROJECT, "developer")
    assert not iam.allows(subject, PROJECT, "editor")
    assert not iam.allows(subject, "another project", "viewer")
    assert not iam.allows(None, PROJECT, "viewer")
    iam.set_role(subject, PROJECT, None)
    assert iam.role_of(subject, PROJECT) is None
    with pytest.raises(ValueError, match="owner"):
        iam.set_role(subject, PROJECT, "owner")
    with pytest.raises(KeyError, match="nobody"):
        iam.set_role("nobody", PROJECT, "viewer")


async def test_an_authorized_key_buys_a_token():
    iam = Iam(PROJECT)
    subject = iam.add_service_account("airflow")
    key = iam.create_key(subject)
    assert key["private_key"].startswith(
        f"PLEASE DO NOT REMOVE THIS LINE! Yandex.Cloud SA Key ID <{key['id']}>\n-----BEGIN PRIVATE KEY-----\n"
    )
    assert set(key) == {"id", "service_account_id", "created_at", "key_algorithm", "public_key", "private_key"}
    journal = Journal()
    async with served(iam, journal) as stub:
        answer = await stub.Create(messages.CreateIamTokenRequest(jwt=signed(key)))
        assert iam.subject_of(answer.iam_token) == subject
        assert answer.expires_at.seconds == pytest.approx(time.time() + 12 * 3600, abs=5)
        iam.delete_key(key["id"])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Create(messages.CreateIamTokenRequest(jwt=signed(key)))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [call.code for call in journal.calls("IamToken.Create")] == ["OK", "UNAUTHENTICATED"]
    assert all(call.request == {} for call in journal.calls())


@pytest.fixture(scope="module")
def iam_with_keys() -> tuple[Iam, dict[str, str], dict[str, str]]:
    iam = Iam(PROJECT)
    return iam, iam.create_key(iam.default_service_account_id), iam.create_key(iam.add_service_account("other"))


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "https://example.com"},
        {"iss": "aje00000000000000000"},
        {"kid": "aje00000000000000000"},
        {"algorithm": "RS256"},
        {"iat": 1_000_000_000, "exp": 1_000_003_600},
        lambda now: {"exp": now + 7200},
        lambda now: {"iat": now + 1000, "exp": now + 2000},
    ],
    ids=["audience", "issuer", "key", "algorithm", "expired", "too-long", "from-the-future"],
)
def test_a_wrong_jwt_is_refused(iam_with_keys, changes):
    iam, key, _ = iam_with_keys
    if callable(changes):
        changes = changes(int(time.time()))  # now, not when the tests were collected
    assert iam.subject_of(iam.exchange_jwt(signed(key))) == key["service_account_id"]
    with pytest.raises(Unauthenticated):
        iam.exchange_jwt(signed(key, **changes))


def test_a_jwt_signed_with_another_accounts_key_is_refused(iam_with_keys):
    iam, key, other = iam_with_keys
    with pytest.raises(Unauthenticated, match="Signature"):
        iam.exchange_jwt(signed({**other, "id": key["id"], "service_account_id": key["service_account_id"]}))
    with pytest.raises(Unauthenticated):
        iam.exchange_jwt("not a jwt")


async def test_an_oauth_token_buys_a_token_of_its_user():
    iam = Iam(PROJECT)
    user = iam.add_user("somebody")
    oauth = iam.add_oauth_token(user)
    async with served(iam) as stub:
        answer = await stub.Create(messages.CreateIamTokenRequest(yandex_passport_oauth_token=oauth))
        assert iam.subject_of(answer.iam_token) == user
        for request, code in (
            (messages.CreateIamTokenRequest(yandex_passport_oauth_token="y0_x"), grpc.StatusCode.UNAUTHENTICATED),
            (messages.CreateIamTokenRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Create(request)
            assert refused.value.code() is code
    with pytest.raises(ValueError, match="only service accounts have authorized keys"):
        iam.create_key(user)
    with pytest.raises(ValueError, match="only users have OAuth tokens"):
        iam.add_oauth_token(iam.default_service_account_id)


async def test_impersonation_needs_permission_and_a_valid_token():
    iam = Iam(PROJECT)
    caller, target = iam.default_service_account_id, iam.add_service_account("target")
    metadata = (("authorization", f"Bearer {iam.issue_token(caller)}"),)
    request = messages.CreateIamTokenForServiceAccountRequest(service_account_id=target)

    async def refusal(request: Any, metadata: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.CreateForServiceAccount(request, metadata=metadata)
        return refused.value.code()

    async with served(iam) as stub:
        assert await refusal(request, ()) is grpc.StatusCode.UNAUTHENTICATED
        assert await refusal(request, metadata) is grpc.StatusCode.PERMISSION_DENIED
        iam.allow_impersonation(caller, target)
        answer = await stub.CreateForServiceAccount(request, metadata=metadata)
        assert iam.subject_of(answer.iam_token) == target
        unknown = messages.CreateIamTokenForServiceAccountRequest(service_account_id="aje00000000000000000")
        assert await refusal(unknown, metadata) is grpc.StatusCode.NOT_FOUND


async def test_a_token_is_revoked_by_call():
    iam = Iam(PROJECT)
    token, other = (iam.issue_token(iam.default_service_account_id) for _ in range(2))
    journal = Journal()
    async with served(iam, journal) as stub:
        metadata = (("authorization", f"Bearer {other}"),)
        request = messages.RevokeIamTokenRequest(iam_token=token)
        answer = await stub.Revoke(request, metadata=metadata)
        assert answer.subject_id == iam.default_service_account_id
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Revoke(request, metadata=metadata)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(Unauthenticated, match="revoked"):
        iam.subject_of(token)
    assert token not in repr(journal.calls())


def test_everything_survives_a_restart():
    before = Iam(PROJECT, token_lifetime=777)
    subject, user = before.default_service_account_id, before.add_user("somebody")
    target = before.add_service_account("target")
    before.set_role(subject, PROJECT, "editor")
    key, oauth, token = before.create_key(subject), before.add_oauth_token(user), before.issue_token(subject)
    revoked = before.issue_token(subject)
    before.revoke(token=revoked)
    before.allow_impersonation(subject, target)
    text = json.dumps(before.to_json())
    assert "PRIVATE KEY" not in text
    after = Iam.from_json(json.loads(text))
    assert after.subject_of(token) == subject
    with pytest.raises(Unauthenticated, match="revoked"):
        after.subject_of(revoked)
    assert after.role_of(subject, PROJECT) == "editor"
    assert after.default_service_account_id == subject
    assert after.token_lifetime == 777
    assert after.subject_of(after.exchange_jwt(signed(key))) == subject
    assert after.subject_of(after.exchange_oauth(oauth)) == user
    assert after.subject_of(after.impersonate(subject, target)) == target
    assert after.to_json()["accounts"] == before.to_json()["accounts"]
