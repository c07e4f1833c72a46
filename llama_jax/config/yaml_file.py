"""Reads and writes a run's configuration as YAML, and explains its keys.

pydantic checks the types and says where something is wrong; this module adds the line of the
file and the nearest valid name, and makes the manual of all keys out of the same fields.
"""

import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from llama_jax.config.family import FAMILY
from llama_jax.config.run import Config
from llama_jax.config.validation import Problem, first_problem
from llama_jax.errors import InputError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration in the YAML file `path`, changed by `overrides`.

    >>> lj.load_config("tiny.yaml", ["training.steps=3"]).training.steps
    3

    Args:
        path: a YAML file with the sections of `Config`, or the name of one that comes with
            llama_jax. `model.family` names a member of the family whose numbers are the defaults
            of the section.
        overrides: `section.key=value` each, the value read as YAML.

    Raises:
        InputError: names file, line and key, and the nearest valid name of an unknown key.
    """
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        if isinstance(error, FileNotFoundError):
            reason += f"; llama_jax comes with {', '.join(_included())}"
        raise InputError(f"can't read the configuration {path}: {reason}") from error
    document = _Document(str(path))
    document.add_file(text)
    for override in overrides:
        document.add_override(override)
    return document.config()


def find(path: str | Path) -> Path:
    """Returns the configuration file that `path` names.

    A file of that path comes first; else `quickstart` and `configs/quickstart.yaml` name the one
    that comes with llama_jax, and so on.
    """
    if not Path(path).is_file():
        for name, included in _included().items():
            if Path(path) in (Path(name), Path("configs", f"{name}.yaml")):
                return included
    return Path(path)


def _included() -> dict[str, Path]:
    """Returns the configuration files that come with llama_jax, by name."""
    here = Path(__file__).parents[1]
    installed = here / "configs"  # in a wheel; a checkout has them beside the package
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def dump(config: Config) -> str:
    """Returns the resolved configuration as YAML that `load` reads back to an equal one."""
    plain = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _Document:
    """Values on their way to a Config, with the place each came from."""

    def __init__(self, path: str):
        self.path = path
        self.values: dict[str, Any] = {}
        self.places: dict[tuple[str, ...], str] = {}

    def add_file(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "it can't be parsed"
            raise InputError(f"{self.path}{line}: not valid YAML: {problem}") from error
        self._note_places(node, ())
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: the file must hold sections: {', '.join(SECTIONS)}")
        self.values = values

    def _note_places(self, node: yaml.Node | None, key: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            child = (*key, str(key_node.value))
            place = f"{self.path}:{key_node.start_mark.line + 1}"
            if child in self.places:
                first = self.places[child].rsplit(":", 1)[1]
                raise InputError(f"{place}: {'.'.join(child)} was already given in line {first}")
            self.places[child] = place
            self._note_places(value_node, child)

    def add_override(self, override: str) -> None:
        name, equals, text = override.partition("=")
        key = tuple(name.split("."))
        place = f"command line, '{override}'"
        if not equals or not all(key):
            raise InputError(f"{place}: an override is written section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{place}: the value is not valid YAML") from error
        target = self.values
        for part in key[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[key[-1]] = value
        # What stood under this key in the file is gone, and so are its places.
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self.places[key] = place

    def config(self) -> Config:
        values = self.values
        model = values.get("model")
        if isinstance(model, dict) and "family" in model:
            values = values | {"model": self._member(model)}
        try:
            return TypeAdapter(Config).validate_python(values)
        except ValidationError as error:
            raise InputError(self._sentence(first_problem(error))) from error

    def _member(self, model: dict[str, Any]) -> dict[str, Any]:
        name = model["family"]
        if name not in FAMILY:
            near = _nearest(str(name), FAMILY)
            raise InputError(
                f"{self._location(('model', 'family'))}: model.family: there is no {name!r};"
                f" {near or 'known are ' + ', '.join(FAMILY)}"
            )
        defaults = dataclasses.asdict(FAMILY[name])
        return defaults | {key: value for key, value in model.items() if key != "family"}

    def _location(self, key: tuple[str, ...]) -> str:
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.path)

    def _sentence(self, problem: Problem) -> str:
        sentence = f"{self._location(problem.path)}: {problem.sentence()}"
        if problem.is_unknown:
            section = ".".join(problem.path[:-1])
            siblings = [key for key in KEYS if key.rpartition(".")[0] == section]
            hint = _same_name(problem.path[-1]) or _nearest(problem.key, siblings or SECTIONS)
            return f"{sentence}; {hint or 'known are ' + ', '.join(siblings or SECTIONS)}"
        if problem.is_missing:
            known = KEYS.get(problem.key)
            return f"{sentence} ({known.description if known else 'a section'}); add it"
        return sentence


def _nearest(name: str, valid: Sequence[str] | dict[str, Any]) -> str | None:
    close = difflib.get_close_matches(name.lower(), list(valid), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def _same_name(name: str) -> str | None:
    """Finds a key that was put into the wrong section."""
    close = [key for key in KEYS if key.rpartition(".")[2] == name]
    return f"did you mean {close[0]}?" if close else None


@dataclasses.dataclass(frozen=True)
class Key:
    """What the manual says about one key."""

    name: str
    type: str
    default: str
    description: str


def _keys(cls: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=False)
    # The type checker does not see the attribute that pydantic adds to the class.
    for name, field in getattr(cls, "__pydantic_fields__").items():  # noqa: B009
        hint = hints[name]
        nested = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if field.description:
            default = "required" if field.is_required() else _yaml_value(field.default)
            yield Key(prefix + name, _type_name(hint), default, field.description)
        for cls_below in nested:
            yield from _keys(typing.cast(type, cls_below), f"{prefix}{name}.")


def _yaml_value(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return "|".join(_type_name(arg) for arg in args)
    if origin is tuple:
        return "list"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {"str": "text", "dict": "map"}.get(
        name := getattr(origin or hint, "__name__", str(hint)), name
    )


SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
_FAMILY_KEY = Key(
    "model.family", "text", "null", "member whose numbers are the defaults of this section"
)
KEYS = {key.name: key for key in [_FAMILY_KEY, *_keys(Config)]}


def manual() -> str:
    """Returns the page that explains every key: name, type, default, meaning [unit]."""
    lines: list[str] = []
    section = ""
    for key in KEYS.values():
        if key.name.split(".")[0] != section:
            section = key.name.split(".")[0]
            lines.append(f"\n{section}:")
        lines.append(f"  {key.name}  ({key.type}, default {key.default})")
        lines += textwrap.wrap(
            key.description, 88, initial_indent=6 * " ", subsequent_indent=6 * " "
        )
    return "\n".join(lines)
