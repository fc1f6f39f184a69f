"""A key's mark in a job's description."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_datasphere.client.submission.job_key import MAX_DESC_CHARACTERS, Key, request_of, retries_of

REQUEST = "0a1b2c3d"

KEY = Key(("dag", "run", "task", -1, 2), "dag.task manual__2026-11-22", retries=2)


@given(desc=st.none() | st.text(max_size=400), label=st.text(max_size=400), retries=st.integers(0, 10_000))
def test_the_mark_fits_and_is_found_whatever_people_write(desc: str | None, label: str, retries: int) -> None:
    key = Key(("dag", "run", "task", -1, 2), label, retries)
    described = key.tag_description(desc, REQUEST)
    assert len(described) <= MAX_DESC_CHARACTERS
    assert key.token in described
    assert retries_of(described) == retries
    assert request_of(described) == REQUEST


@given(desc=st.text(max_size=400), label=st.text(max_size=100))
def test_a_mark_inherited_from_the_source_is_replaced(desc: str, label: str) -> None:
    inherited = Key(("other",), label, retries=7)
    described = KEY.tag_description(inherited.tag_description(desc, REQUEST), REQUEST)
    assert inherited.token not in described
    assert KEY.token in described
    assert retries_of(described) == 2
    assert KEY.tag_description(described, REQUEST) == described


@given(before=st.text(max_size=60), after=st.text(max_size=60))
def test_a_token_anywhere_in_the_source_is_removed(before: str, after: str) -> None:
    """Somebody has copied a description, or cut its bracket."""
    inherited = Key(("other",), "x", retries=7)
    for mark in (inherited.token, f"{inherited.token} retries:7 request:ffff]", f"[cut {inherited.token}"):
        described = KEY.tag_description(f"{before}{mark}{after}", REQUEST)
        assert inherited.token not in described
        assert KEY.token in described
        assert (retries_of(described), request_of(described)) == (2, REQUEST)


def test_people_can_read_it() -> None:
    described = KEY.tag_description("Nightly training", REQUEST)
    assert described == f"Nightly training [dag.task manual__2026-11-22 {KEY.token} retries:2 request:0a1b2c3d]"
    assert KEY.tag_description(None, REQUEST) == f"[dag.task manual__2026-11-22 {KEY.token} retries:2 request:0a1b2c3d]"


def test_what_somebody_wrote_comes_before_the_names_of_dag_task_and_run() -> None:
    key = Key(("dag",), f"{'d' * 60}.{'t' * 60} scheduled__2026-11-22T00:00:00+00:00", retries=2)
    described = key.tag_description("Nightly training of the model", REQUEST)
    assert described.startswith("Nightly training of the model [ddd")
    assert "…" in described
    assert f"11-22T00:00:00+00:00 {key.token} retries:2 request:0a1b2c3d]" in described


def test_a_description_that_looks_like_a_mark_is_not_taken_for_it() -> None:
    assert retries_of(KEY.tag_description("tune retries:9] soon", REQUEST)) == 2
    assert retries_of("retries:9]") is None


def test_each_generation_has_its_token() -> None:
    other = Key(("dag", "run", "task", -1, 3), KEY.label, 2)
    assert other.token != KEY.token
    assert Key(KEY.parts, "another label", retries=5).token == KEY.token
    assert KEY.for_try(1).token != KEY.for_try(2).token != KEY.token
