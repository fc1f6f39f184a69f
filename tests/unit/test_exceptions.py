"""The two sides of each failure: what the client raises, and what Airflow retries."""

from __future__ import annotations

import inspect
import pickle

import pytest

from airflow_provider_datasphere import exceptions
from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.client.access_errors import CredentialRefusedError, CredentialUnavailableError
from airflow_provider_datasphere.compat import AirflowException, AirflowFailException

CLIENT = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.DataSphereError)]
AIRFLOW = [
    cls for _, cls in inspect.getmembers(exceptions, inspect.isclass) if issubclass(cls, exceptions.DataSphereError)
]

#: By the public contract: not retried = also an AirflowFailException.
NOT_RETRIED = {"JobRequestError", "MissingOutputsError", "JobCancelledError"}


@pytest.mark.parametrize("cls", CLIENT)
def test_every_client_error_has_an_airflow_twin(cls: type[errors.DataSphereError]) -> None:
    twin = exceptions.airflow_side(cls("what happened"))
    assert type(twin).__name__ == cls.__name__
    assert isinstance(twin, cls)
    assert isinstance(twin, AirflowException)
    assert str(twin) == "what happened"
    assert isinstance(twin, AirflowFailException) == (cls.__name__ in NOT_RETRIED)


@pytest.mark.parametrize("cls", AIRFLOW)
def test_every_class_is_built_from_one_string_and_survives_pickling(cls: type[exceptions.DataSphereError]) -> None:
    error = cls("text")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == "text"


@pytest.mark.parametrize("cls", CLIENT)
def test_a_final_failure_is_not_retried_unless_the_job_may_go_on(cls: type[errors.DataSphereError]) -> None:
    error = exceptions.airflow_side(cls("text"), final=True)
    assert isinstance(error, cls)
    expected = cls not in (errors.DataSphereError, errors.JobLostError)
    assert isinstance(error, AirflowFailException) == expected


def test_a_subclass_of_a_client_error_keeps_its_kind() -> None:
    refused = exceptions.airflow_side(CredentialRefusedError("the key was deleted"))
    unavailable = exceptions.airflow_side(CredentialUnavailableError("no answer"))
    assert isinstance(refused, AirflowFailException)
    assert not isinstance(unavailable, AirflowFailException)
    assert type(unavailable) is exceptions.DataSphereError


def test_translating_keeps_the_cause_and_leaves_other_errors_alone() -> None:
    cause = errors.JobFailedError("return code 3")
    with pytest.raises(exceptions.JobFailedError, match="return code 3") as caught, exceptions.translated():
        raise cause
    assert caught.value.__cause__ is cause
    with pytest.raises(ZeroDivisionError), exceptions.translated():
        raise ZeroDivisionError
    own = exceptions.JobRequestError("already ours")
    with pytest.raises(exceptions.JobRequestError) as again, exceptions.translated():
        raise own
    assert again.value is own
