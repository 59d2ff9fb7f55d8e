"""The `transrec` command: prepare data, train, evaluate, recommend, and push, describe and inspect checkpoints.

This module is outside the package, because importing the package imports torch: so `transrec --help` answers at once.
Each verb imports what it needs; the verbs of `VERBS` are functions of `transrec_hf.commands`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


VERBS = {
    "prepare": ("prepare", "Turn the exports of a shop into a checked data set."),
    "codes": ("codes", "Describe each item by codes, a few whole numbers."),
    "stats": ("stats", "Show what a data set holds."),
    "plan": ("runs", "Predict time and memory of a training run."),
    "pretrain": ("runs", "Train a new model on one platform."),
    "finetune": ("runs", "Go on training a model on another platform."),
    "distill": ("distill", "Make a smaller and faster model from a larger one."),
    "transfer-report": ("transfer", "Tell whether models of other platforms help on yours."),
    "benchmark": ("benchmark", "Run a published benchmark, beside its numbers."),
    "evaluate": ("evaluate", "Rank the held-out items of a data set."),
    "encode": ("index", "Compute the vectors of items, and keep them."),
    "index": ("index", "Add, update and remove items of an index, or look at it."),
    "recommend": ("recommend", "Recommend items to users."),
    "similar": ("index", "Find items that are similar to another one."),
    "serve": ("serve", "Serve recommendations over HTTP."),
    "demo": ("demo", "Show a recommender in the browser."),
    "export": ("export", "Write a model as graphs that run without this package."),
    "env": ("env", "Print the versions and the machine."),
}
"""Verbs whose options are dataclasses: for each, its module in `transrec_hf.commands` and its line in `--help`."""

app = typer.Typer(
    help="Recommendation that transfers. Every verb has a --help of its own, with an example.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def checkpoint_folder(path: Any) -> Any:
    """Refuse a path that cannot be the folder of a checkpoint, before anything slow is imported."""
    for folder in map(Path, path if isinstance(path, list) else [path]):
        if not folder.is_dir():
            fail(f"{folder}: no such folder (now in {os.getcwd()}). Check the path.", 2)
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            fail(f"{folder}: there is no config.json here. Give the folder of a checkpoint.", 2)
    return path


def checkpoint_folder_or_id(place: str) -> str:
    """Like [`checkpoint_folder`], but the place may also be the id of a Hub repository."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", place) and not Path(place).is_dir()
    return place if is_id else checkpoint_folder(place)


CheckpointFolder = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="Folder of a checkpoint.", show_default=False, callback=checkpoint_folder),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)]
Token = Annotated[str | None, typer.Option(help="Hub token, instead of the one of `hf auth login`.")]


@contextmanager
def without_torch() -> Iterator[None]:
    """Inside, modules can be imported without the package itself, whose import takes long because of torch."""
    if "transrec_hf" in sys.modules:
        yield
        return
    spec = importlib.util.find_spec("transrec_hf")
    assert spec is not None
    sys.modules["transrec_hf"] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules["transrec_hf"]


def print_version(asked: bool) -> None:
    """The version, without importing the package."""
    from importlib.metadata import version

    if asked:
        typer.echo(version("transrec-hf"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recommendation that transfers. Every verb has a --help of its own, with an example."""


def add_verb(name: str, room: str, line: str) -> None:
    """Add a verb that parses its own options, `--help` included."""

    @app.command(
        name,
        help=line,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        logging.basicConfig(format="%(message)s")
        is_first = os.environ.get("RANK", "0") == "0"
        logging.getLogger("transrec_hf").setLevel(logging.INFO if is_first else logging.ERROR)
        verb: Callable[[list[str]], Any] = getattr(
            importlib.import_module(f"transrec_hf.commands.{room}"), name.replace("-", "_")
        )
        verb(context.args)


for _name, (_room, _line) in VERBS.items():
    add_verb(_name, _room, _line)


@app.command()
def push(
    path: CheckpointFolder,
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="Repository on the Hub, as org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Revision = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload checkpoint",
    whole: Annotated[
        bool, typer.Option("--whole", help="First write into PATH the weights that it only names.")
    ] = False,
    token: Token = None,
) -> None:
    """Push a checkpoint to the Hub.

    \b
        transrec push runs/my_target me/my_target
        transrec push runs/my_target me/my_target --private --revision second
        transrec push runs/thin me/my_target --whole               # a thin checkpoint, with all of its weights

    The processor, the statistics, the index and the model card are pushed too. The card is written again for the new
    name, unless somebody has edited it.
    """
    from huggingface_hub import HfApi, constants

    from transrec_hf.errors import DataError, hub_errors
    from transrec_hf.publishing.card import model_card, update_model_card
    from transrec_hf.publishing.checkpoint import read_config
    from transrec_hf.publishing.facts import CARD_NAME
    from transrec_hf.publishing.hub import check_pushable, make_whole, upload_checkpoint

    if not (read_config(path).weights_from and whole):
        check_pushable(path)
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{repo_id}: nothing can be pushed while HF_HUB_OFFLINE is set: unset it, then push again")
    if whole:
        make_whole(path)
    card = path / CARD_NAME
    if not os.path.lexists(card) or (card.is_file() and card.read_bytes() == str(model_card(path)).encode()):
        update_model_card(path, model_id=repo_id)
    with hub_errors(repo_id):
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        upload_checkpoint(path, repo_id, token=token, revision=revision, commit_message=message)
    typer.echo(url)


@app.command()
def card(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Folders of checkpoints.", callback=checkpoint_folder)
    ],
    from_results: Annotated[
        Path | None, typer.Option(help="CSV with the numbers, instead of those of the run.", show_default=False)
    ] = None,
    run: Annotated[str | None, typer.Option(help="Which run of the CSV.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Which model of the run.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Which targets.")] = "test",
    repo_id: Annotated[str | None, typer.Option("--id", help="Repository on the Hub.", show_default=False)] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the card and its data, without weights.", show_default=False)
    ] = None,
) -> None:
    """Write the model card of a checkpoint.

    \b
        transrec card runs/my_target --license mit
        transrec card runs/my_target --id me/my_target --output cards/my_target

    The card is made from the small files beside the weights, so the command needs neither training nor data. If the
    numbers of a card came from a CSV, the CSV is read again.
    """
    from transrec_hf.publishing.card import update_model_card
    from transrec_hf.publishing.results import read_results

    if len(paths) > 1 and (from_results or output or repo_id):
        raise typer.BadParameter("give one PATH with --from-results, --output or --id")
    results = read_results(from_results, run, model, split) if from_results else None
    given = {"model_id": repo_id, "license": licence}
    for path in paths:
        metadata = {name: value for name, value in given.items() if value is not None}
        typer.echo(update_model_card(path, results, output, **metadata))


@app.command()
def info(
    path_or_id: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_ID", help="Folder or Hub id of a checkpoint.", callback=checkpoint_folder_or_id
        ),
    ],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    token: Token = None,
) -> None:
    """Show what a checkpoint is, and its metrics.

    \b
        transrec info runs/my_target
        transrec info me/my_target --json

    It prints modalities, towers, sizes, parameters, data and metrics. Weights are not downloaded.
    """
    is_local = Path(path_or_id).is_dir()
    folder = Path(path_or_id) if is_local else download(path_or_id, revision, token)
    with without_torch():
        from transrec_hf.publishing.facts import look

    facts = look(folder)
    if facts is None:
        from transrec_hf.publishing.card import describe_checkpoint

        facts = describe_checkpoint(folder, local=is_local)
    if as_json:
        typer.echo(json.dumps({"checkpoint": path_or_id, **facts}, indent=2))
    else:
        typer.echo(format_facts(path_or_id, facts))


def download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """A folder with the small files of a repository on the Hub."""
    from huggingface_hub import snapshot_download

    with without_torch():
        from transrec_hf.errors import hub_errors

    small = ["config.json", "adapter_config.json", "data_statistics.json", "evaluation.json"]
    with hub_errors(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=small))


def format_facts(name: str, facts: dict[str, Any]) -> str:
    """The result of [`describe_checkpoint`] as text, one fact on each line."""
    kind = f"{facts['adapter']} adapter, " if facts["adapter"] else ""
    lines = {"modalities": kind + (", ".join(facts["modalities"]) or "none: an ID baseline")}
    for tower in facts["towers"]:
        origin = f"from {tower['name']}, licence {tower['licence']}" if tower["name"] else "not pre-trained"
        lines[f"{tower['modality']} tower"] = f"{tower['architecture']}, {origin}"
    if facts["elsewhere"]:
        names = (f"{part['name']} ({(part['revision'] or 'a folder')[:8]})" for part in facts["elsewhere"])
        lines["thin"] = f"all other weights are read from {', '.join(names)}"
    lines["objective"] = facts["objective"]
    lines["sizes"] = ", ".join(f"{size} {value:,}" for size, value in facts["sizes"].items())
    lines["parameters"] = ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items())
    counted = (f"{value:,} {kind.removeprefix('num_')}" for kind, value in facts["data"].items() if "num_" in kind)
    lines["data"] = ", ".join([facts["data"]["name"], *counted])
    lines["metrics"] = f"{facts['split']} targets" if facts["metrics"] else "not evaluated yet"
    for metric, value in facts["metrics"].items():
        ends = facts["intervals"].get(metric)
        lines[f"  {metric}"] = f"{value:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")
    width = max(map(len, lines))
    return "\n".join([name, *(f"  {fact:<{width}}  {value}" for fact, value in lines.items())])


def fail(sentence: str, code: int) -> NoReturn:
    """End with one sentence on standard error."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(code) from None


def main() -> None:
    """Run a verb. Every error ends in one sentence, with exit code 2 for bad input and 1 for the Hub and the disk."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows `?` for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        from safetensors import SafetensorError

        with without_torch():
            from transrec_hf.errors import DataError, HubError, one_line

        if isinstance(error, UnicodeEncodeError):
            fail("a name on the command line is not UTF-8: set LC_ALL=C.UTF-8, or use another name", 2)
        if not isinstance(error, (OSError, ValueError, SafetensorError)) or os.environ.get("TRANSREC_DEBUG"):
            raise
        said = str(error) if isinstance(error, (DataError, HubError)) else one_line(error)
        fail(said, 2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
