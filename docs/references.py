"""An extension of Griffe: cross-references of docstrings, ``[`Recommender`]``, become links of the site.

What the reference shows is linked. What belongs to another library, or to the inside of the package, is shown as code.
A name that exists nowhere ends the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe


TYPES = re.compile(r"^(?P<name>\s+[\w*, ]+ )\((?P<type>.+)\):(?=\s)", re.MULTILINE)
RAISES = re.compile(r"^(?P<space>\s+)\[?`~?(?P<type>[\w.\[\], ]+)`\]?:(?=\s)", re.MULTILINE)
"""What stands for a type: the site shows it as code by itself."""
REFERENCE = re.compile(r"\[`(?P<name>~?[\w.]+)`\](?![\[(])")
OTHERS = {
    "transformers",
    "huggingface_hub",
    "datasets",
    "evaluate",
    "peft",
    "torch",
    "AutoModel",
    "AutoConfig",
    "AutoProcessor",
}


class References(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "transrec_hf":
            return
        public = {str(key).strip("'\"") for key in pkg["_LAZY"].value.keys}  # ...and what is imported at once
        public |= {name for name, member in pkg.members.items() if member.is_alias and name[0].isupper()}
        objects = [obj for obj in walk(pkg) if not obj.is_module]
        classes = {obj.name: obj for obj in objects if obj.is_class}
        places = {
            obj.name: f"transrec_hf.{obj.name}" if obj.name in public else "" for obj in objects if not in_class(obj)
        }
        for name, cls in classes.items():
            for member, owner in members(cls, classes).items():
                is_shown = name in public and owner.members[member].has_docstring and member[0] != "_"
                places[f"{name}.{member}"] = f"transrec_hf.{name}.{member}" if is_shown else ""

        unknown = []
        for obj in objects:
            if obj.docstring is None:
                continue
            owner = obj if obj.is_class else obj.parent

            def linked(match: re.Match, obj: Any = obj, owner: Any = owner) -> str:
                name = match["name"].lstrip("~")
                short = name.rpartition(".")[2] if match["name"].startswith("~") else name
                if name.partition(".")[0] in OTHERS:
                    return f"`{short}`"
                if not {f"{owner.name}.{name}", name} & set(places):
                    unknown.append(f"{obj.path}: {name}")
                place = places.get(f"{owner.name}.{name}") or places.get(name)
                return f"[`{short}`][{place}]" if place else f"`{short}`"

            text = obj.docstring.value.replace("> [!NOTE]\n", "")
            text = TYPES.sub(lambda match: f"{match['name']}({without_marks(match['type'])}):", text)
            text = RAISES.sub(r"\g<space>\g<type>:", text)
            obj.docstring.value = REFERENCE.sub(linked, text)
        if unknown:
            raise ValueError("docstrings refer to what there is not:\n" + "\n".join(unknown))


def without_marks(text: str) -> str:
    """A type without brackets, quotes and stars: ``[`~torch.Tensor`], *optional*`` is `Tensor, optional`."""
    text = REFERENCE.sub(
        lambda match: match["name"].lstrip("~") if match["name"][0] != "~" else match["name"].rpartition(".")[2], text
    )
    return re.sub(r"[`*]", "", text)


def walk(obj: Any) -> Iterator[Any]:
    """An object of the package, and everything in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)


def in_class(obj: Any) -> bool:
    return obj.parent is not None and obj.parent.is_class


def members(cls: Any, classes: dict[str, Any]) -> dict[str, Any]:
    """The members of a class, with those of its bases in the package, each with the class that has it."""
    found = dict.fromkeys(cls.members, cls)
    for base in cls.bases:
        name = str(base).rpartition(".")[2]
        if name in classes and name != cls.name:
            found = {**members(classes[name], classes), **found}
    return found
