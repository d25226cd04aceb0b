"""The system description: what the records of the runs tell, and what a person adds."""

from collections.abc import Mapping
from pathlib import Path

from base.config import read_mapping
from base.errors import UserError
from submission.runs import Run

CHOICES = {"division": ("closed", "open"), "status": ("cloud", "onprem", "preview", "research")}  # of MLPerf's log, ruleset 1.0.0
WHOLE = ("number_of_nodes", "host_processors_per_node", "accelerators_per_node")  # read as whole numbers by MLPerf's summary
OF_ACCELERATORS = (
    "accelerator_model_name", "accelerator_host_interconnect", "accelerator_frequency", "accelerator_on-chip_memories",
    "accelerator_memory_configuration", "accelerator_memory_capacity", "accelerator_interconnect", "accelerator_interconnect_topology",
)  # fmt: skip


def told(run: Run) -> dict[str, str]:
    """The fields that a run's records tell. All values are text, as MLPerf's checker joins them."""
    facts, packages = run.facts, dict(run.facts["packages"])
    framework = f"PyTorch {packages.pop('torch')}"
    fields = {
        "number_of_nodes": str(run.config.nodes),
        "host_processor_model_name": facts["cpu"],
        "host_processor_vcpu_count": str(facts["cores"]),  # logical CPUs of a node that the run could use; physical cores are not recorded
        "accelerators_per_node": "0",
        "hw_notes": "",
        "framework": framework,
        "other_software_stack": ", ".join(f"{name} {version}" for name, version in {"python": facts["python"], **packages}.items()),
        "operating_system": facts["system"],
        "sw_notes": f"backend {facts['backend']}, commit {facts['commit']}",
    }
    if facts["memory_gib"] is not None:
        fields["host_memory_capacity"] = f"{facts['memory_gib']} GiB"
    if facts["accelerator"] is None:
        return {**fields, **dict.fromkeys(OF_ACCELERATORS, "N/A")}
    return {**fields, "accelerators_per_node": str(run.config.devices), "accelerator_model_name": facts["accelerator"]["name"]}


def describe(run: Run, stated: Mapping[str, str | None], file: Path | None, system: str) -> tuple[dict[str, str], list[str]]:
    """→ the description, and lines on what the file says otherwise than the records.

    ``stated`` are fields that flags set; one that the file has too must be the same. Raises UserError for what cannot be.
    """
    added = read_mapping(file) if file else {}
    for field, value in added.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{file}: {field} is {value!r}; a text or a number is needed, in quotes where YAML reads it as something else")
    added = {field: str(value) for field, value in added.items()}
    for field, value in stated.items():
        if value is not None and added.setdefault(field, value) != value:
            raise UserError(f"{file}: {field} is {added[field]!r}, and by its flag {value!r}; keep one")
    records = told(run)
    notes = [f"{field}: {added[field]!r} from {file}, {records[field]!r} by the records"
             for field in records if added.get(field, records[field]) != records[field] and records[field]]  # fmt: skip
    fields = {"system_name": system, **records, **added}
    for field, choices in CHOICES.items():
        if fields.get(field, choices[0]) not in choices:
            raise UserError(f"{field} is {fields[field]!r}; it is one of {', '.join(choices)}")
    for field in WHOLE:
        if field in fields and not fields[field].isdecimal():
            raise UserError(f"{file}: {field} is {fields[field]!r}; a whole number is needed")
    return fields, notes
