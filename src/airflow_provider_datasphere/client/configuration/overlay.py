"""Arguments that are laid over a configuration: those of ``ExecuteJobOperator`` and of ``execute_job``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from airflow_provider_datasphere.client.configuration.faults import Faults, Place
from airflow_provider_datasphere.client.configuration.job_config import JobConfig, PathEntry
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.overrides import OVERRIDE_CHECKS
from airflow_provider_datasphere.client.validation import parse_working_storage

#: Where messages say that an argument stands.
_PLACE = Place("arguments")


@dataclass(frozen=True)
class Overlay:
    """What comes in the place of a configuration's values; nothing leaves the configuration's own.

    :param args: by name, as ``vars``; a name that the configuration doesn't have is a fault.
    :param vars: input variable -> local path or URI; output variable -> path inside the job.
    :param env_vars: by name; new ones are added.
    :param docker: as of :class:`.job_config.JobConfig`.
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB.
    """

    args: Mapping[str, str] = field(default_factory=dict)
    vars: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    desc: str | None = None
    docker: str | Mapping[str, Any] | None = None
    working_storage: Mapping[str, Any] | None = None
    cloud_instance_types: Sequence[str] = ()

    def laid_over(self, config: JobConfig, faults: Faults) -> JobConfig:
        """Return the configuration with these arguments in it."""
        if not self._is_valid(faults):
            return config
        _check_known("args", self.args, config.args, "arguments", faults)
        named = [entry.var for entry in (*config.inputs, *config.outputs) if entry.var]
        _check_known("vars", self.vars, named, "variables of inputs and outputs", faults)
        for var, path in self.vars.items():
            if var in named and not path.removeprefix("file://").strip():
                faults.add(_PLACE, f"vars[{var!r}] is {path!r}: give a path or a URI, or leave {var} out.")
        size = parse_working_storage(self.working_storage)
        docker = self.docker
        return replace(
            config,
            args={**config.args, **{name: value for name, value in self.args.items() if name in config.args}},
            inputs=[self._replaced(entry) for entry in config.inputs],
            outputs=[self._replaced(entry) for entry in config.outputs],
            env_vars={**config.env_vars, **self.env_vars},
            name=config.name if self.name is None else self.name,
            desc=config.desc if self.desc is None else self.desc,
            docker=(docker if isinstance(docker, str) else dict(docker)) if docker else config.docker,
            working_storage_gib=config.working_storage_gib if size is None else size,
            cloud_instance_types=tuple(self.cloud_instance_types) or config.cloud_instance_types,
        )

    def _is_valid(self, faults: Faults) -> bool:
        valid = True
        for name, check in OVERRIDE_CHECKS.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            try:
                check(value)
            except JobRequestError as error:
                faults.add(_PLACE, str(error))
                valid = False
        return valid

    def _replaced(self, entry: PathEntry) -> PathEntry:
        if not entry.var or entry.var not in self.vars:
            return entry
        return PathEntry(self.vars[entry.var], entry.var, replace(_PLACE, field=f"vars[{entry.var!r}]"))


def _check_known(name: str, given: Iterable[str], known: Iterable[str], what: str, faults: Faults) -> None:
    have = list(known)
    unknown = [one for one in given if one not in have]
    if unknown:
        faults.add(
            _PLACE,
            f"{name} names {', '.join(map(repr, unknown))}, which the configuration doesn't have; its {what}: "
            f"{', '.join(have) or 'none'}.",
        )
