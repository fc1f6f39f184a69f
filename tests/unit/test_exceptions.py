"""The two sides of each failure: what the client raises, and what Airflow retries."""

from __future__ import annotations

import inspect
import pickle
import traceback

import pytest

from airflow_provider_datasphere import exceptions
from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.client.connection.errors import CredentialRefusedError, CredentialUnavailableError
from airflow_provider_datasphere.client.errors import Interrupted
from airflow_provider_datasphere.compat import AirflowException, AirflowFailException

#: Kinds that Airflow's side needs no name for.
WITHOUT_TWIN = {
    errors.Interrupted: "DataSphereError",
    errors.JobNotStartedError: "JobInfrastructureError",
    errors.PermanentResultsError: "ResultsError",
    errors.ResultsGoneError: "ResultsError",
}
CLIENT = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.DataSphereError) and cls not in WITHOUT_TWIN
]
AIRFLOW = [
    cls for _, cls in inspect.getmembers(exceptions, inspect.isclass) if issubclass(cls, exceptions.DataSphereError)
]

#: By the public contract: not retried = also an AirflowFailException.
NOT_RETRIED = {"JobRequestError", "MissingOutputsError", "JobCancelledError"}


@pytest.mark.parametrize("cls", CLIENT)
def test_every_client_error_has_an_airflow_twin(cls: type[errors.DataSphereError]) -> None:
    twin = exceptions.to_airflow_exception(cls("what happened"))
    assert type(twin).__name__ == cls.__name__
    assert isinstance(twin, cls)
    assert isinstance(twin, AirflowException)
    assert str(twin) == "what happened"
    assert isinstance(twin, AirflowFailException) == (cls.__name__ in NOT_RETRIED)


@pytest.mark.parametrize(("cls", "name"), WITHOUT_TWIN.items())
def test_a_kind_without_a_twin_becomes_its_base_class(cls: type[errors.DataSphereError], name: str) -> None:
    assert type(exceptions.to_airflow_exception(cls("what happened"))).__name__ == name


@pytest.mark.parametrize("cls", AIRFLOW)
def test_every_class_is_built_from_one_string_and_survives_pickling(cls: type[exceptions.DataSphereError]) -> None:
    error = cls("text")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "text"


@pytest.mark.parametrize("cls", CLIENT)
def test_a_final_failure_is_not_retried_unless_the_job_may_go_on(cls: type[errors.DataSphereError]) -> None:
    error = exceptions.to_airflow_exception(cls("text"), retryable=False)
    assert isinstance(error, cls)
    expected = cls not in (errors.DataSphereError, errors.JobLostError)
    assert isinstance(error, AirflowFailException) == expected


def test_a_subclass_of_a_client_error_keeps_its_kind() -> None:
    refused = exceptions.to_airflow_exception(CredentialRefusedError("the key was deleted"))
    unavailable = exceptions.to_airflow_exception(CredentialUnavailableError("no answer"))
    assert isinstance(refused, AirflowFailException)
    assert not isinstance(unavailable, AirflowFailException)
    assert type(unavailable) is exceptions.DataSphereError


def fails() -> None:
    raise errors.JobFailedError("return code 3") from OSError("the wire")


def test_a_translated_error_is_read_once_with_its_own_cause() -> None:
    with pytest.raises(exceptions.JobFailedError, match="return code 3") as caught, exceptions.airflow_exceptions():
        fails()
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("JobFailedError: return code 3") == 1
    assert text.count("OSError: the wire") == 1
    assert "in fails" in text
    assert type(caught.value.client_error) is errors.JobFailedError
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.client_error) == (exceptions.JobFailedError, "return code 3", None)


def test_a_users_mistake_is_one_traceback() -> None:
    with pytest.raises(exceptions.JobRequestError) as caught, exceptions.airflow_exceptions():
        raise errors.JobRequestError("args names 'RNGE'")
    assert caught.value.__cause__ is None
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1


def test_an_interrupt_is_known_by_its_twin() -> None:
    with pytest.raises(exceptions.DataSphereError) as caught, exceptions.airflow_exceptions():
        raise Interrupted("the task is being killed")
    assert exceptions.was_interrupted(caught.value)
    assert not exceptions.was_interrupted(exceptions.DataSphereError("something else"))


def test_translating_leaves_other_errors_alone() -> None:
    with pytest.raises(ZeroDivisionError), exceptions.airflow_exceptions():
        raise ZeroDivisionError
    own = exceptions.JobRequestError("already ours")
    with pytest.raises(exceptions.JobRequestError) as again, exceptions.airflow_exceptions():
        raise own
    assert again.value is own
