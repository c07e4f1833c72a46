"""Reads and writes the configuration of a run as YAML, and lists its keys with descriptions.

pydantic checks the types and reports the path of a wrong value; this module adds the line of the
file and the nearest valid name. The manual of all keys is generated from the fields of `Config`.
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

from llama_jax.config.data import Source, StoragePath
from llama_jax.config.family import FAMILY
from llama_jax.config.prepare import KINDS, SourceEntry
from llama_jax.config.run import Config
from llama_jax.config.validation import Problem, first_problem
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, parse_path


def load(path: str | AnyPath, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration in the YAML file `path`, changed by `overrides`.

    >>> lj.load_config("tiny.yaml", ["training.steps=3"]).training.steps
    3

    Args:
        path: a YAML file with the sections of `Config`, or the name of an included file.
            `model.family` names a member of the family that gives the defaults of `model`.
        overrides: each is `section.key=value`, with a YAML value.

    Raises:
        InputError: names file, line and key, and the nearest valid name of an unknown key.
    """
    return _read(path, overrides).config()


def load_prepare(path: str | AnyPath, overrides: Sequence[str] = ()) -> dict[str, SourceEntry]:
    """Returns the section `prepare` of a YAML file: an entry for each folder of documents.

    A run doesn't use the section, so that its keys can change while a run is in progress.

    Args:
        path: as for `load`. The file needs no other section.
        overrides: as for `load`.

    Raises:
        InputError: as `load`; or the file has no such section.
    """
    return _read(path, overrides).prepare()


def _read(path: str | AnyPath, overrides: Sequence[str]) -> "_Document":
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        if isinstance(error, FileNotFoundError):
            reason += f"; llama_jax includes {', '.join(_included())}"
        raise InputError(f"can't read the configuration {path}: {reason}") from error
    document = _Document(str(path))
    document.add_file(text)
    for override in overrides:
        document.add_override(override)
    return document


def find(path: str | AnyPath) -> AnyPath:
    """Returns the path of the configuration file that `path` names.

    If there is no such file, `quickstart` and `configs/quickstart.yaml` name the file that is
    included in llama_jax; likewise for the other included files.
    """
    path = parse_path(path)
    if not path.is_file():
        for name, included in _included().items():
            if path in (Path(name), Path("configs", f"{name}.yaml")):
                return included
    return path


def _included() -> dict[str, Path]:
    """Returns the included configuration files by name."""
    package = Path(__file__).parents[1]
    installed = package / "configs"  # in a wheel; in a checkout, configs/ is next to the package
    folder = installed if installed.is_dir() else package.parent / "configs"
    files = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def dump(config: Config) -> str:
    """Returns the complete configuration as YAML; `load` reads an equal configuration from it."""
    plain = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _Document:
    """The values of a file and of overrides, and the location of each, for error messages."""

    def __init__(self, path: str):
        self.path = path
        self.values: dict[str, Any] = {}
        self.locations: dict[tuple[str, ...], str] = {}

    def add_file(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "it can't be parsed"
            raise InputError(f"{self.path}{line}: not valid YAML: {problem}") from error
        self._record_locations(node, ())
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: the file must contain sections: {', '.join(SECTIONS)}")
        self.values = values

    def _record_locations(self, node: yaml.Node | None, key: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            child = (*key, str(key_node.value))
            location = f"{self.path}:{key_node.start_mark.line + 1}"
            if child in self.locations:
                first = self.locations[child].rsplit(":", 1)[1]
                raise InputError(f"{location}: {'.'.join(child)} is already set in line {first}")
            self.locations[child] = location
            self._record_locations(value_node, child)

    def add_override(self, override: str) -> None:
        name, equals, text = override.partition("=")
        key = tuple(name.split("."))
        location = f"command line, '{override}'"
        if not equals or not all(key):
            raise InputError(f"{location}: an override has the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{location}: the value is not valid YAML") from error
        target = self.values
        for part in key[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[key[-1]] = value
        # The override replaces the value in the file with all keys below it.
        self.locations = {k: v for k, v in self.locations.items() if k[: len(key)] != key}
        self.locations[key] = location

    def config(self) -> Config:
        values = {key: value for key, value in self.values.items() if key != "prepare"}
        model = values.get("model")
        if isinstance(model, dict) and "family" in model:
            values = values | {"model": self._with_family_defaults(model)}
        try:
            return TypeAdapter(Config).validate_python(values)
        except ValidationError as error:
            raise InputError(self._sentence(first_problem(error))) from error

    def prepare(self) -> dict[str, SourceEntry]:
        values = self.values.get("prepare")
        if not isinstance(values, dict) or not values:
            raise InputError(
                f"{self._location(('prepare',))}: the section prepare must name at least one folder"
                " of documents, such as `docs/c4: {kind: c4, inputs: [crawl/*.warc.gz]}`"
            )
        try:
            return TypeAdapter(dict[StoragePath, SourceEntry]).validate_python(values)
        except ValidationError as error:
            problem = first_problem(error)
            # pydantic adds the kind to the path, after the folder.
            path = ("prepare", *problem.path[:1], *problem.path[2:])
            raise InputError(self._prepare_sentence(problem._replace(path=path))) from error

    def _prepare_sentence(self, problem: Problem) -> str:
        where, kinds = self._location(problem.path), [*PREPARE_KEYS]
        entry = self.values["prepare"].get(problem.path[1])
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if kind not in kinds:
            given = f"not {kind!r}" if kind is not None else "and is missing"
            known = ", ".join(kinds)
            return f"{where}: prepare.{problem.path[1]}.kind must be one of {known}, {given}"
        sentence = f"{where}: {problem.sentence()}"
        valid = [key.name for key in PREPARE_KEYS[kind]]
        if problem.is_unknown:
            hint = _suggest_nearest(problem.path[-1], valid)
            return f"{sentence}; {hint or 'known are ' + ', '.join(valid)}"
        return f"{sentence}: add it" if problem.is_missing else sentence

    def _with_family_defaults(self, model: dict[str, Any]) -> dict[str, Any]:
        name = model["family"]
        if name not in FAMILY:
            near = _suggest_nearest(str(name), FAMILY)
            raise InputError(
                f"{self._location(('model', 'family'))}: model.family: {name!r} is not a member;"
                f" {near or 'known are ' + ', '.join(FAMILY)}"
            )
        defaults = dataclasses.asdict(FAMILY[name])
        return defaults | {key: value for key, value in model.items() if key != "family"}

    def _location(self, key: tuple[str, ...]) -> str:
        while key and key not in self.locations:
            key = key[:-1]
        return self.locations.get(key, self.path)

    def _sentence(self, problem: Problem) -> str:
        sentence = f"{self._location(problem.path)}: {problem.sentence()}"
        if problem.is_unknown:
            section = ".".join(problem.path[:-1])
            siblings = [key for key in KEYS if key.rpartition(".")[0] == section]
            name, valid = problem.key, siblings if section and siblings else SECTIONS
            if problem.path[:2] in (("data", "mixture"), ("data", "phases")):
                name, valid = problem.path[-1], [f.name for f in dataclasses.fields(Source)]
            hint = _suggest_section(problem.path[-1]) or _suggest_nearest(name, valid)
            return f"{sentence}; {hint or 'known are ' + ', '.join(valid)}"
        if problem.is_missing:
            known = KEYS.get(problem.key)
            what = known.description if known else "a section" if len(problem.path) == 1 else None
            return f"{sentence} ({what}); add it" if what else f"{sentence}: add it"
        if problem.value is None and any(":" in part for part in problem.path):
            return f"{sentence}; write a space after the colon of {{PATH: 1}}"
        return sentence


def _suggest_nearest(name: str, valid: Sequence[str] | dict[str, Any]) -> str | None:
    close = difflib.get_close_matches(name.lower(), list(valid), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def _suggest_section(name: str) -> str | None:
    """Returns a hint to the key of this name in another section."""
    keys = [key for key in KEYS if key.rpartition(".")[2] == name]
    return f"did you mean {keys[0]}?" if keys else None


@dataclasses.dataclass(frozen=True)
class Key:
    """The entry of a key in the manual."""

    name: str
    type: str
    default: str
    description: str


def _list_keys(cls: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=False)
    # pydantic adds the attribute; the type checker does not know it.
    for name, field in getattr(cls, "__pydantic_fields__").items():  # noqa: B009
        hint = hints[name]
        nested = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if field.description:
            value = field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else _yaml_value(value)
            yield Key(prefix + name, _type_name(hint), default, field.description)
        for cls_below in nested:
            yield from _list_keys(typing.cast(type, cls_below), f"{prefix}{name}.")


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
    "model.family",
    "text",
    "null",
    "member of the LLaMA family, such as llama2-7b, that gives the defaults of this section",
)
KEYS = {key.name: key for key in [_FAMILY_KEY, *_list_keys(Config)]}
# Of an entry of `prepare`, by its kind.
PREPARE_KEYS = {
    typing.get_args(cls.__annotations__["kind"])[0]: [*_list_keys(cls)] for cls in KINDS
}


def manual() -> str:
    """Returns the manual of all keys: name, type, default, description [unit]."""
    lines: list[str] = []
    section = ""
    for key in KEYS.values():
        if key.name.split(".")[0] != section:
            section = key.name.split(".")[0]
            lines.append(f"\n{section}:")
        lines += _describe(key)
    return "\n".join(lines)


def prepare_manual() -> str:
    """Returns the manual of the keys of an entry of `prepare`, kind by kind."""
    lines: list[str] = []
    for kind, keys in PREPARE_KEYS.items():
        lines += [f"\nkind: {kind}", *(line for key in keys for line in _describe(key))]
    return "\n".join(lines)


def _describe(key: Key) -> list[str]:
    default = "required" if key.default == "required" else f"default {key.default}"
    text = textwrap.wrap(key.description, 88, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return [f"  {key.name}  ({key.type}, {default})", *text]
