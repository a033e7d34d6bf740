"""Prints the Markdown tables of docs/configuration.md from the services' Settings classes, which are the only source of the facts.

`python docs/generate_settings.py` prints them; `--write` puts them between the markers of docs/configuration.md; `--missing` lists the
fields without a `Field(description=…)`, whose meaning is left empty.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
# Run as a file, Python puts docs/ on the path and not the repository.
sys.path.insert(0, str(ROOT))

from services.kernel.settings import ServiceSettings  # noqa: E402 - needs the path above

SERVICES = ("tenant", "ratelimit", "inference", "retrieval", "metering")
CONFIGURATION = Path(__file__).resolve().parent / "configuration.md"
BEGIN = "<!-- settings:begin -->"
END = "<!-- settings:end -->"
HEADER = "| field | environment | default | meaning |\n|---|---|---|---|"


def settings_class(service: str) -> type[ServiceSettings]:
    """Returns the one subclass of ServiceSettings that `services/<service>/settings.py` defines. Raises: LookupError."""
    module = importlib.import_module(f"services.{service}.settings")
    found = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, ServiceSettings) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        msg = f"services/{service}/settings.py must define one subclass of ServiceSettings, not {len(found)}"
        raise LookupError(msg)
    return found[0]


def own_fields(settings: type[ServiceSettings]) -> Mapping[str, FieldInfo]:
    """Returns the fields a service's class adds, and those of every service whose default it changes."""
    shared = ServiceSettings.model_fields
    return {
        name: field
        for name, field in settings.model_fields.items()
        if name not in shared or repr(shared[name].default) != repr(field.default)
    }


def environment_name(settings: type[ServiceSettings], field_name: str) -> str:
    """Returns the variable that sets the field."""
    return f"{settings.model_config.get('env_prefix', '')}{field_name}".upper()


def render() -> str:
    """Returns the tables: what every service has, then each service's own."""
    sections = ["### Every service", _table(ServiceSettings, ServiceSettings.model_fields)]
    for service in SERVICES:
        settings = settings_class(service)
        sections += [f"### {service}", _table(settings, own_fields(settings))]
    return "\n\n".join(sections) + "\n"


def document(text: str) -> str:
    """Returns the page with the tables between its markers. Raises: ValueError when a marker is missing."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        msg = f"the page needs the lines {BEGIN} and {END}"
        raise ValueError(msg)
    return f"{before}{BEGIN}\n\n{render()}\n{END}{after}"


def missing() -> Iterator[str]:
    """Yields `Class.field` of every field without a description, each once."""
    yield from (f"ServiceSettings.{name}" for name, field in ServiceSettings.model_fields.items() if not field.description)
    for service in SERVICES:
        settings = settings_class(service)
        # A default changed for one service keeps the meaning it has for all.
        own = (item for item in own_fields(settings).items() if item[0] not in ServiceSettings.model_fields)
        yield from (f"{settings.__name__}.{name}" for name, field in own if not field.description)


def _table(settings: type[ServiceSettings], fields: Mapping[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | `{environment_name(settings, name)}` | {_default(field.default)} | {_meaning(name, field)} |"
        for name, field in fields.items()
    ]
    return "\n".join([HEADER, *rows])


def _meaning(name: str, field: FieldInfo) -> str:
    shared = ServiceSettings.model_fields.get(name)
    text = field.description or (shared.description if shared is not None else None) or ""
    return " ".join(text.split()).replace("|", "\\|")


def _default(value: object) -> str:
    if isinstance(value, SecretStr):
        # A secret with a default would be a secret in the repository; its text stays out of the page in any case.
        return "empty" if not value.get_secret_value() else "set"
    if isinstance(value, Path):
        # Relative, so that the page reads the same wherever the repository lies.
        return f"`{value.relative_to(ROOT).as_posix() if value.is_relative_to(ROOT) else value.as_posix()}`"
    return "empty" if value == "" else f"`{value}`"


def main(arguments: list[str]) -> int:
    """Runs the script; 2 for an argument that is not known."""
    match arguments:
        case []:
            sys.stdout.write(render())
        case ["--write"]:
            CONFIGURATION.write_text(document(CONFIGURATION.read_text()))
        case ["--missing"]:
            sys.stdout.writelines(f"{name}\n" for name in missing())
        case _:
            sys.stderr.write("usage: python docs/generate_settings.py [--write | --missing]\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
