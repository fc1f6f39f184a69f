"""Tokens: every kind of credential against a real IAM over sockets, renewal, and what happens when there is none."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

from airflow_provider_datasphere.client.connection import iam, token_source
from airflow_provider_datasphere.client.connection.channels import AsyncChannels, Channels
from airflow_provider_datasphere.client.connection.errors import (
    CredentialError,
    CredentialRefusedError,
    CredentialUnavailableError,
)
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.connection.token_source import TokenSource
from datasphere_emulator import Emulator
from datasphere_emulator import iam as emulated_iam

Make = Callable[..., Settings]
HOUR = 3600.0


@pytest.fixture
def make(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Settings for the emulator without a credential of their own; its metadata service is this machine's."""
    monkeypatch.setenv("YC_METADATA_ADDR", datasphere_emulator.metadata_address)

    def make(**extra: Any) -> Settings:
        return Settings.from_extra(datasphere_emulator.connection_extra(**{"iam_token": None, **extra}))

    return make


class Clock:
    """Stands in for the module ``time``: the test turns it on, so that twelve hours pass at once."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of tokens, here and at IAM; a token lives twelve hours."""
    clock = Clock()
    monkeypatch.setattr(token_source, "time", clock)
    monkeypatch.setattr(emulated_iam, "time", clock)
    return clock


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon where nobody answers."""
    monkeypatch.setattr(iam, "FETCH_RETRY_SECONDS", 0.5)


def key(emulator: Emulator, **changes: Any) -> str:
    return json.dumps({**emulator.service_account_key(), **changes})


def whose(channels: Channels, emulator: Emulator) -> str | None:
    """The account that a call through these channels belongs to."""
    channels.unary("projects", "Get", GetProjectRequest(project_id=emulator.project_id), timeout=10)
    subject: str | None = emulator.journal.calls("Project.Get")[-1].subject
    return subject


# Kinds of credential -----------------------------------------------------------------------------------------------


def test_service_account_key(datasphere_emulator: Emulator, make: Make) -> None:
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    token = source.token()
    assert datasphere_emulator.iam.subject_of(token) == datasphere_emulator.service_account_id
    assert source.description.startswith(f"service account {datasphere_emulator.service_account_id} (by its authorized")
    assert source.token() == token
    (call,) = datasphere_emulator.journal.calls("IamToken.Create")
    assert call.deadline is not None


def test_a_token_has_the_end_that_iam_gives_it(datasphere_emulator: Emulator, make: Make) -> None:
    issued = iam.fetch_token(make(service_account_json=key(datasphere_emulator)))
    assert issued.expires_at == pytest.approx(datasphere_emulator.iam.expires_at(issued.value), abs=0.01)


def test_metadata_service(datasphere_emulator: Emulator, make: Make) -> None:
    token = TokenSource(make()).token()
    assert datasphere_emulator.iam.subject_of(token) == datasphere_emulator.service_account_id
    assert datasphere_emulator.journal.calls("metadata.token")


def test_metadata_service_is_not_asked_through_a_proxy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert TokenSource(make()).token()


def test_oauth(datasphere_emulator: Emulator, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    user = datasphere_emulator.iam.add_user("somebody")
    with pytest.warns(DeprecationWarning, match="withdrawing OAuth"):
        settings = make(oauth=datasphere_emulator.iam.add_oauth_token(user))
    assert datasphere_emulator.iam.subject_of(TokenSource(settings).token()) == user
    assert "withdrawing OAuth" in caplog.text


@pytest.mark.parametrize("base", ["metadata", "key", "token"])
def test_impersonation(datasphere_emulator: Emulator, make: Make, base: str) -> None:
    other = datasphere_emulator.iam.add_service_account("other")
    extra = {
        "metadata": {},
        "key": {"service_account_json": key(datasphere_emulator)},
        "token": {"iam_token": datasphere_emulator.iam_token},
    }[base]
    settings = make(impersonate_service_account_id=other, **extra)
    with pytest.raises(CredentialRefusedError, match="tokenCreator") as raised:
        TokenSource(settings).token()
    assert other in str(raised.value)
    datasphere_emulator.iam.allow_impersonation(datasphere_emulator.service_account_id, other)
    source = TokenSource(settings)
    assert datasphere_emulator.iam.subject_of(source.token()) == other
    assert source.description.startswith(f"service account {other}, impersonated by ")
    # The impersonated token is renewable even when the one below is not.
    assert source.token(refused=source.token()) != ""


# Credentials that are no good --------------------------------------------------------------------------------------


def test_a_key_that_was_deleted(datasphere_emulator: Emulator, make: Make) -> None:
    source = TokenSource(make(service_account_json=key(datasphere_emulator, id="ajenosuchkey00000000")))
    with pytest.raises(CredentialRefusedError) as raised:
        source.token()
    assert "IAM refuses authorized key ajenosuchkey00000000" in str(raised.value)
    assert "this machine's clock is wrong (it shows 20" in str(raised.value)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    # A refusal isn't repeated.
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1


def test_a_wrong_clock(datasphere_emulator: Emulator, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(service_account_json=key(datasphere_emulator))
    monkeypatch.setattr(iam, "time", SimpleNamespace(time=lambda: time.time() - 7200))
    with pytest.raises(CredentialRefusedError, match="clock is wrong"):
        TokenSource(settings).token()


def test_a_damaged_key(datasphere_emulator: Emulator, make: Make) -> None:
    damaged = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0Q2FuYXJ5\n-----END PRIVATE KEY-----\n"
    with pytest.raises(CredentialRefusedError, match="service_account_json: the private key can't be read") as raised:
        TokenSource(make(service_account_json=key(datasphere_emulator, private_key=damaged))).token()
    assert "c2VjcmV0" not in "".join(traceback.format_exception(raised.value))


def test_an_iam_token_that_is_refused(datasphere_emulator: Emulator, make: Make) -> None:
    token = datasphere_emulator.iam_token
    source = TokenSource(make(iam_token=token))
    assert source.token() == token
    assert iam.fetch_token(make(iam_token=token)).expires_at is None
    with pytest.raises(CredentialRefusedError, match=r"expired .* revoked or mistyped") as raised:
        source.token(refused=token)
    assert token not in str(raised.value)
    # It may have been a whim of the service: the next call tries it again.
    assert source.token() == token


def test_an_old_iam_token_says_that_its_end_is_near(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TokenSource(make(iam_token="t1.x"))
    source.token()
    assert not caplog.records
    monkeypatch.setattr(token_source, "STATIC_TOKEN_WARNING_SECONDS", 0.0)
    source.token()
    source.token()
    assert len([record for record in caplog.records if "lives 12 hours at most" in record.getMessage()]) == 1


@pytest.mark.usefixtures("quick")
def test_nobody_at_the_metadata_address(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop: somebody has to fill in a credential, and waiting is in vain."""
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:1")
    with pytest.raises(
        CredentialRefusedError, match=r"no credential, and the metadata service at 127.0.0.1:1"
    ) as raised:
        TokenSource(make()).token()
    assert "isn't there (connection refused). Fill in a credential of the connection: service_account_json" in str(
        raised.value
    )
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.usefixtures("quick")
def test_no_way_to_the_metadata_address(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: Any) -> None:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(CredentialRefusedError, match=r"isn't there \(no route to host\)"):
        TokenSource(make()).token()


@pytest.mark.usefixtures("quick")
def test_a_metadata_service_that_goes_away_is_waited_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, datasphere_emulator: Emulator
) -> None:
    source = TokenSource(make())
    first = source.token()
    with monkeypatch.context() as patch:
        patch.setattr(
            socket.socket, "connect", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError(111, "refused"))
        )
        with pytest.raises(CredentialUnavailableError, match=r"isn't there") as raised:
            source.token(refused=first)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert source.token()


@pytest.mark.parametrize("renewal", [False, True])
async def test_one_thread_that_can_not_start_does_not_end_all_tokens(
    datasphere_emulator: Emulator,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    renewal: bool,
) -> None:
    source = TokenSource(make())
    if renewal:
        monkeypatch.setattr(token_source, "REFRESH_SHARE", 1.0)  # due at once
        monkeypatch.setattr(token_source, "REFRESH_SECONDS", float("inf"))
        first = source.token()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        if renewal:
            assert source.token() == await source.atoken() == first
            assert "failed, using the current token" in caplog.text
        else:
            with pytest.raises(CredentialUnavailableError, match="can't start new thread"):
                source.token(timeout=5)
            with pytest.raises(CredentialUnavailableError, match="can't start new thread"):
                await source.atoken(timeout=5)
    assert datasphere_emulator.iam.subject_of(await source.atoken(timeout=5)) == datasphere_emulator.service_account_id


@pytest.mark.parametrize("status", [500, 503, 429])
def test_metadata_service_is_asked_again(datasphere_emulator: Emulator, make: Make, status: int) -> None:
    datasphere_emulator.faults.inject("metadata.token", status=status, times=2)
    assert TokenSource(make()).token()
    assert len(datasphere_emulator.journal.calls("metadata.token")) == 3


@pytest.mark.parametrize("status", [403, 404])
def test_a_machine_without_service_account(datasphere_emulator: Emulator, make: Make, status: int) -> None:
    datasphere_emulator.faults.inject("metadata.token", status=status, times=1)
    source = TokenSource(make())
    with pytest.raises(CredentialRefusedError, match="no service account is attached"):
        source.token()
    # Never "down for ever".
    assert source.token()


def test_iam_is_asked_again(datasphere_emulator: Emulator, make: Make) -> None:
    datasphere_emulator.faults.inject("IamToken.Create", code="UNAVAILABLE", times=2)
    assert TokenSource(make(service_account_json=key(datasphere_emulator))).token()


@pytest.mark.usefixtures("quick")
def test_iam_that_stays_away(datasphere_emulator: Emulator, make: Make) -> None:
    datasphere_emulator.faults.inject("IamToken.Create", code="UNAVAILABLE")
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    with pytest.raises(CredentialUnavailableError, match=r"IAM at localhost:.* doesn't answer: UNAVAILABLE"):
        source.token()
    datasphere_emulator.faults.clear()
    assert source.token()


def test_a_caller_waits_no_longer_than_its_own_deadline(datasphere_emulator: Emulator, make: Make) -> None:
    datasphere_emulator.faults.inject("IamToken.Create", hang=True)
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    begun = time.monotonic()
    with pytest.raises(CredentialUnavailableError, match=r"within 0.2 seconds"):
        source.token(timeout=0.2)
    with pytest.raises(CredentialUnavailableError, match=r"within 0.2 seconds"):
        asyncio.run(source.atoken(timeout=0.2))
    assert time.monotonic() - begun < 3.0
    datasphere_emulator.faults.clear()
    assert source.token()


def test_errors_survive_pickling() -> None:
    for kind in (CredentialError, CredentialRefusedError, CredentialUnavailableError):
        again = pickle.loads(pickle.dumps(kind("what happened")))
        assert type(again) is kind
        assert (str(again), again.details(), again.code()) == ("what happened", "what happened", kind("").code())


# Renewal -----------------------------------------------------------------------------------------------------------


def test_refreshed_ahead_of_its_end(datasphere_emulator: Emulator, make: Make, clock: Clock) -> None:
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    seen: dict[str, float] = {}
    for _ in range(100):
        token = source.token()
        seen.setdefault(token, clock.time())
        assert clock.time() < datasphere_emulator.iam.expires_at(token)
        while source._refresh is not None:
            time.sleep(0.01)
        clock.ahead += HOUR / 2
    tokens = list(seen)
    assert len(tokens) >= 4
    # The last one may not have been used yet.
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) - len(tokens) in (0, 1)
    # Each successor was there while the one before it was still valid.
    for before, after in pairwise(tokens):
        assert seen[after] < datasphere_emulator.iam.expires_at(before)


def test_a_failed_early_renewal_goes_on_with_the_old_token(
    datasphere_emulator: Emulator,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(iam, "FETCH_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(token_source, "REFRESH_SHARE", 1.0)  # renewal is due at once
    monkeypatch.setattr(token_source, "REFRESH_RETRY_SECONDS", 0.3)
    datasphere_emulator.iam.token_lifetime = 60.0
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    token = source.token()
    datasphere_emulator.faults.inject("IamToken.Create", code="UNAVAILABLE")
    deadline = time.monotonic() + 10
    while "using the current token" not in caplog.text and time.monotonic() < deadline:
        assert source.token() == token
        time.sleep(0.01)
    assert "failed, using the current token" in caplog.text
    assert token not in caplog.text
    datasphere_emulator.faults.clear()
    while source.token() == token and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.token() != token


def test_a_revoked_token_is_replaced_in_the_middle(datasphere_emulator: Emulator, make: Make) -> None:
    channels = Channels(make(service_account_json=key(datasphere_emulator)))
    assert whose(channels, datasphere_emulator) == datasphere_emulator.service_account_id
    datasphere_emulator.iam.revoke()
    assert whose(channels, datasphere_emulator) == datasphere_emulator.service_account_id
    codes = [call.code for call in datasphere_emulator.journal.calls("Project.Get")]
    assert codes == ["OK", "UNAUTHENTICATED", "OK"]
    channels.close()


def test_threads_share_one_fetch(datasphere_emulator: Emulator, make: Make) -> None:
    datasphere_emulator.faults.inject("IamToken.Create", delay=0.3)
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    with ThreadPoolExecutor(32) as pool:
        tokens = set(pool.map(lambda _: source.token(), range(200)))
    assert len(tokens) == 1
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1


async def test_coroutines_share_one_fetch_and_one_thread(
    datasphere_emulator: Emulator, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iam, "IAM_DEADLINE_SECONDS", 60.0)  # a busy machine needs no second fetch
    monkeypatch.setattr(iam, "FETCH_RETRY_SECONDS", 60.0)
    fault = datasphere_emulator.faults.inject("IamToken.Create", hang=True)
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    before = threading.active_count()
    waiting = [asyncio.create_task(source.atoken()) for _ in range(1000)]
    # The loop goes on turning while the token is fetched.
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert threading.active_count() <= before + 1
        assert not any(task.done() for task in waiting)
    datasphere_emulator.faults.remove(fault)
    assert len(set(await asyncio.gather(*waiting))) == 1
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1


async def test_a_cancelled_waiter_takes_nothing_from_the_others(datasphere_emulator: Emulator, make: Make) -> None:
    datasphere_emulator.faults.inject("IamToken.Create", delay=0.2)
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    first, second = asyncio.create_task(source.atoken()), asyncio.create_task(source.atoken())
    await asyncio.sleep(0.05)
    first.cancel()
    assert await second
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1


async def test_a_thousand_triggers_through_many_expiries(
    datasphere_emulator: Emulator, make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refresh per expiry, one at a time, and no call ever carries a token past its end."""
    fetch_token = iam.fetch_token
    fetching, at_once = 0, []

    def counted(settings: Settings) -> iam.IssuedToken:
        nonlocal fetching
        fetching += 1
        at_once.append(fetching)
        try:
            return fetch_token(settings)
        finally:
            fetching -= 1

    monkeypatch.setattr(iam, "fetch_token", counted)
    life = datasphere_emulator.iam.token_lifetime
    channels = AsyncChannels.shared(make(service_account_json=key(datasphere_emulator)))
    project = GetProjectRequest(project_id=datasphere_emulator.project_id)

    async def call() -> None:
        while True:
            try:
                await channels.unary("projects", "Get", project, timeout=120)
            except grpc.RpcError as error:
                # A server with too many streams at once turns some away unread.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            else:
                return

    async def calls_of_all(in_between: float = 0.0) -> int:
        """One call of each trigger, ``in_between`` seconds passing while half of them are under way; all refreshes."""
        first = [asyncio.create_task(call()) for _ in range(500)]
        await asyncio.sleep(0)
        clock.ahead += in_between
        await asyncio.gather(*first, *(call() for _ in range(500)))
        while channels.tokens._refresh is not None:
            await asyncio.sleep(0.01)
        return len(at_once)

    assert life == 12 * HOUR
    assert await calls_of_all() == 1
    clock.ahead += 6 * HOUR
    assert await calls_of_all() == 1
    clock.ahead += 5.5 * HOUR  # due, and still valid
    assert await calls_of_all() == 2
    clock.ahead += life - 61  # due, and expired for the second half
    assert await calls_of_all(in_between=59) == 3
    clock.ahead += 2 * life  # expired
    assert await calls_of_all() == 4
    assert set(at_once) == {1}
    calls = datasphere_emulator.journal.calls("Project.Get")
    assert len(calls) >= 5000
    assert {call.code for call in calls} == {"OK"}
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 4
    assert len({call.token for call in calls}) == 4
    await channels.close()


# Sharing -----------------------------------------------------------------------------------------------------------


def test_connections_never_share_a_token(datasphere_emulator: Emulator, make: Make) -> None:
    other = datasphere_emulator.iam.add_service_account("other")
    datasphere_emulator.iam.set_role(other, datasphere_emulator.project_id, "viewer")
    first = Channels(make(service_account_json=key(datasphere_emulator)))
    second = Channels(make(service_account_json=json.dumps(datasphere_emulator.iam.create_key(other))))
    for _ in range(3):
        assert whose(first, datasphere_emulator) == datasphere_emulator.service_account_id
        assert whose(second, datasphere_emulator) == other
    first.close()
    second.close()


def test_equal_connections_share_one(datasphere_emulator: Emulator, make: Make) -> None:
    settings = make(service_account_json=key(datasphere_emulator))
    again = make(service_account_json=key(datasphere_emulator))
    assert TokenSource.shared(settings) is TokenSource.shared(again)
    assert TokenSource.shared(settings) is not TokenSource.shared(make())


def test_listeners_see_each_token_before_its_use(datasphere_emulator: Emulator, make: Make) -> None:
    heard: list[str] = []
    willing = False

    def listener(token: str) -> bool:
        heard.append(token)
        return willing

    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    source.listen(listener)
    source.listen(listener)
    first = source.token()
    assert heard == [first]
    willing = True
    source.token()
    assert heard == [first, first]  # "not here" the first time
    source.token()
    assert heard == [first, first]
    second = source.token(refused=first)
    assert heard[-1] == second != first


def test_who_looked_before_a_fetch_landed_does_not_fetch_again(datasphere_emulator: Emulator, make: Make) -> None:
    source = TokenSource(make())
    token = source.token()
    # Another thread, which saw no token a moment ago.
    assert source._start_refresh().result(timeout=5).value == token
    # And one that saw this token's predecessor, due for renewal.
    predecessor = token_source._CachedToken.of(iam.IssuedToken("old", None))
    assert source._start_refresh(instead_of=predecessor).result(timeout=5).value == token
    assert datasphere_emulator.journal.count("metadata.token") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_fetch(datasphere_emulator: Emulator, make: Make) -> None:
    source = TokenSource(make())
    datasphere_emulator.faults.inject("metadata.token", delay=0.5, times=1)
    source._start_refresh()  # the parent is in the middle of a fetch, which the child will never see end
    child = os.fork()
    if child == 0:
        os._exit(0 if source.token(timeout=10) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert source.token()


def test_no_secret_in_repr(datasphere_emulator: Emulator, make: Make) -> None:
    source = TokenSource(make(service_account_json=key(datasphere_emulator)))
    token = source.token()
    assert token not in repr(source)
    assert token not in repr(source._cached)
    assert token not in repr(iam.IssuedToken(token, None))
