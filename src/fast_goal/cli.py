"""The command `fast-goal`: one sub-command per step of the pipeline, `configure` and `doctor`.

Heavy libraries are imported by the steps themselves, so that `fast-goal --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from fast_goal import __version__
from fast_goal.errors import FastGoalError, TemporaryError

STEPS = {
    "download": "Fetch or generate the data sets named in params.yaml and write their records tables.",
    "base": "Obtain the weights to start from: CLIP and the region detector.",
    "flism": "Find for every image the region and the sentence that fit best.",
    "validate": "Check records, regions and pairs with Great Expectations; write the data card.",
    "publish": "Write the training data set with its local pairs in a layout that others can read.",
    "negatives": "Make hard negative captions for the training data, where they are asked for.",
    "intermediate": "A first stage of fine-tuning, on another data set or with another objective, where one is asked for.",
    "finetune": "Fine-tune CLIP with the objective of params.yaml.",
    "evaluate": "Measure the base and the fine-tuned model; write the report.",
    "register": "Register the fine-tuned model in MLflow.",
}


class _InOrder(typer.core.TyperGroup):
    """Lists the steps in their order, which a step with commands below it would else leave."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return [*STEPS, *(name for name in names if name not in STEPS)]


app = typer.Typer(
    cls=_InOrder,
    help="Fine-tune CLIP so that it understands long, detailed descriptions (FAST-GOAL).\n\n"
    "The steps read params.yaml in the current folder. `dvc repro` runs all that are out of date, in order; "
    "the sub-commands run one by hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"fast-goal {__version__}")
        raise typer.Exit


def _add_step(step: str, summary: str) -> None:
    @app.command(step, help=summary, rich_help_panel="Steps, in order")
    def command() -> None:
        from fast_goal.stages import run

        run(step)


def _step_group(step: str, summary: str, more: str) -> typer.Typer:
    """A step with commands below it; without one of them it runs as every other step."""
    group = typer.Typer(help=f"{summary}\n\nWithout a command: the whole step. {more}", invoke_without_command=True)

    @group.callback()
    def command(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            from fast_goal.stages import run

            run(step)

    app.add_typer(group, name=step, rich_help_panel="Steps, in order")
    return group


def _add_flism(summary: str) -> None:
    group = _step_group("flism", summary, "`preview` shows what the current settings do with a few images.")

    @group.command("preview")
    def preview(
        n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images, spread evenly over flism.splits.")] = 24,
        output: Annotated[Path | None, typer.Option(help="PNG file; else .fast_goal/flism_preview.png.")] = None,
    ) -> None:
        """Draw a contact sheet: images with all regions, the winning region and its sentence.

        Needs the steps download and base; works before and after `flism`, and writes nothing that the pipeline reads.
        """
        from fast_goal.stages import preview

        typer.echo(preview.run(n, output))


def _add_finetune(summary: str) -> None:
    group = _step_group("finetune", summary, "`advise` says what fits into a GPU's memory.")

    @group.command("advise")
    def advise(
        memory: Annotated[
            str | None, typer.Option(help="Of one GPU: 24GB (10**9 bytes each) or 24GiB (2**30). Without it: this machine's.")
        ] = None,
        intermediate: Annotated[bool, typer.Option("--intermediate", help="The first stage's training instead.")] = False,
    ) -> None:
        """Say what a training step needs, the largest batch that fits, and which setting helps most.

        Estimated from the sizes of the model, without a GPU and without weights; works before any other step.
        """
        from fast_goal.stages import advice

        typer.echo(advice.run(memory, intermediate))


_GROUPS = {"flism": _add_flism, "finetune": _add_finetune}
for _step, _summary in STEPS.items():
    if _step in _GROUPS:
        _GROUPS[_step](_summary)
    else:
        _add_step(_step, _summary)


@app.command(
    "configure",
    help="Compose params.yaml from the configuration groups.\n\n"
    "Examples: `fast-goal configure` (the demo), `fast-goal configure experiment=own_photos "
    "download.datasets.photos.root=PATH`, `fast-goal configure experiment=demo finetune.epochs=3`.",
    rich_help_panel="Set-up",
)
def configure_command(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="experiment=NAME, GROUP=OPTION or KEY=VALUE", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the result instead of writing params.yaml.")] = False,
    options: Annotated[bool, typer.Option("--list", help="List the experiments and the options of every group.")] = False,
) -> None:
    from fast_goal import configure

    if options:
        for group, names in configure.groups().items():
            typer.echo(f"{group}: {', '.join(names)}")
        return
    if show:
        import yaml

        values = configure.compose(overrides or [])
        configure.check(values)
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)
        return
    params = configure.configure(overrides or [])
    typer.echo(f"params.yaml: experiment {params.experiment}, data set {params.download.train_dataset}. Next: dvc repro")


@app.command(
    "ablate",
    help="Run an ablation of the paper, or one of our own, through DVC's experiment queue and write its table.\n\n"
    "Examples: `fast-goal ablate table=VI` (V, VI, VII, VIII, XIV, XV, XVI, XVII; degla: hard negative captions; flair: "
    "text-conditioned pooling), "
    "`fast-goal ablate table=VI seeds=[0] arms=[global,fast_goal] experiment=demo finetune.epochs=2`. Called again, it goes on "
    "with what is missing.",
    rich_help_panel="Models",
)
def ablate_command(
    words: Annotated[
        list[str],
        typer.Argument(help="table=NAME, seeds=[...], arms=[...], experiment=NAME, KEY=VALUE for all arms", show_default=False),
    ],
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Experiments at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run.")] = False,
) -> None:
    from fast_goal.ablations.study import ablate

    typer.echo(ablate(words, jobs, dry_run))


@app.command("report", rich_help_panel="Models")
def report_command() -> None:
    """Write report.md and report.html of models/reports again, from metrics.json, report.json and the pictures there.

    Nothing is measured or drawn anew: `fast-goal evaluate` does that.
    """
    from fast_goal.evaluation.report import rewrite_report

    typer.echo(rewrite_report(Path("models/reports")) / "report.html")


@app.command("gate", rich_help_panel="Operations")
def gate_command(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only decide; move no alias.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Judge a version that was judged before or rolled back.")] = False,
) -> None:
    """Measure the candidate and the champion on the same test set; promote the candidate if the gate lets it through."""
    from fast_goal.operations import gate

    typer.echo(gate.run(dry_run=dry_run, again=again))


@app.command("rollback", rich_help_panel="Operations")
def rollback_command(
    reason: Annotated[str, typer.Option(help="Why; kept as a tag of the version that is taken back.")] = "",
) -> None:
    """Give the alias `champion` back to the version that had it before."""
    from fast_goal.operations import gate

    typer.echo(gate.rollback(reason))


@app.command("drift", rich_help_panel="Operations")
def drift_command() -> None:
    """Compare the present data with those the champion was trained on, and the models on a frozen probe set."""
    from fast_goal.operations import drift

    typer.echo(drift.run())


@app.command("schedule", rich_help_panel="Operations")
def schedule_command(
    cron: Annotated[str, typer.Option(help="When, as crontab says it.")] = "0 3 * * *",
    words: Annotated[list[str] | None, typer.Argument(help="Passed on to flows/retrain.py.", show_default=False)] = None,
) -> None:
    """Retrain at set times: looks for new data, runs the pipeline, and promotes what passes the gate. Runs until stopped."""
    from fast_goal.operations import schedule

    raise typer.Exit(schedule.run(cron, words or []))


class _CompareFormat(StrEnum):
    text = "text"
    md = "md"
    json = "json"


@app.command("compare", rich_help_panel="Operations")
def compare_command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Two or more runs: id, the beginning of an id, name, latest, latest~1, or models:/NAME@ALIAS.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="What is equal too, and the load of the machine.")] = False,
    format: Annotated[_CompareFormat, typer.Option(help="text, md or json.")] = _CompareFormat.text,
    view: Annotated[bool, typer.Option("--view", help="Print the addresses of MLflow's saved chart views.")] = False,
) -> None:
    """Print in what the parameters, data, commits and metrics of MLflow runs differ."""
    from fast_goal.operations import compare

    if runs or not view:
        typer.echo(compare.run(runs or [], everything, str(format)))
    if view:
        typer.echo(compare.view())


MODEL_HELP = "URI in MLflow, or a folder; else the champion of the model that params.yaml names."


@app.command("serve", rich_help_panel="Operations")
def serve_command(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 5002,
    image_root: Annotated[
        Path | None, typer.Option(envvar="FAST_GOAL_IMAGE_ROOT", help="Folder below which `image_path` is read; else refused.")
    ] = None,
    allow_urls: Annotated[
        str, typer.Option(envvar="FAST_GOAL_ALLOW_URLS", help="Hosts that `image_url` may name, by commas; 1: all public ones.")
    ] = "",
    max_rows: Annotated[int, typer.Option(min=1, help="Rows in one request.")] = 256,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Size of one request, in units of 2**20 bytes.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Requests decoded at once; they are computed one by one.")] = 4,
) -> None:
    """Serve a model over HTTP, on loopback: /invocations, /health, /metadata. See docs/serving.md."""
    from fast_goal.operations import serve
    from fast_goal.tracking.champion import champion_uri

    serve.run(serve.Options(model or champion_uri(), host, port, image_root, allow_urls, max_rows, max_megabytes, threads))


class _Mode(StrEnum):
    global_ = "global"
    conditioned = "conditioned"
    rerank = "rerank"


@app.command(
    "embed",
    help="Embed a folder of images, or the texts of a table, to parquet; with --against, write the best images of each text "
    "instead. Killed, the same command goes on.\n\n"
    "Examples: `fast-goal embed my_photos --output photos.parquet`, `fast-goal embed captions.csv --column caption "
    "--output captions.parquet`, `fast-goal embed my_photos --against captions.csv --mode rerank --top-k 20 "
    "--output scores.parquet`. See docs/serving.md.",
    rich_help_panel="Operations",
)
def embed_command(
    source: Annotated[Path, typer.Argument(help="Folder of images, or a table (CSV, JSONL, parquet) with texts.")],
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, or texts, at once; the result does not depend on it.")] = 64,
    column: Annotated[str, typer.Option(help="Of a table: the column with the texts.")] = "text",
    patches: Annotated[
        bool,
        typer.Option(
            "--patches", help="Write also what text-conditioned pooling compares: patches of images, queries of texts."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Table of texts: for each, the best images of SOURCE and their scores are written instead."),
    ] = None,
    mode: Annotated[
        _Mode | None,
        typer.Option(
            help="With --against. global (the default): the cosine of the embeddings. conditioned: of the text with the image "
            "as the text pools its patches; needs a model with text-conditioned pooling. rerank: the best by global, in the "
            "order of conditioned.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="With --against: images of each text that are written, else 128.", show_default=False),
    ] = None,
) -> None:
    from fast_goal.tracking.champion import champion_uri

    model = model or champion_uri()
    if against is None:
        from fast_goal.operations import embed

        for option, given in (("--mode", mode), ("--top-k", top_k)):
            if given is not None:
                raise typer.BadParameter(f"{option} says how images and texts are compared: name a table with --against.")
        typer.echo(embed.run(source, output, model, batch_size, column, patches))
        return
    from fast_goal.operations import scores

    if patches:
        raise typer.BadParameter("--patches and --against: the one writes numbers of images or texts, the other their scores.")
    typer.echo(
        scores.run(source, against, output, model, (mode or _Mode.global_).value, top_k or scores.TOP_K, batch_size, column)
    )


@app.command("services", rich_help_panel="Operations")
def services_command(
    data: Annotated[Path, typer.Option(help="Folder for their data and logs.")] = Path(".fast_goal/services"),
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="For MLflow.")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="For Prefect.")] = 4200,
) -> None:
    """Start MLflow and Prefect on loopback, and show where; Ctrl-C ends both."""
    from fast_goal.operations import services

    raise typer.Exit(services.run(data, mlflow_port, prefect_port))


class _ExportFormat(StrEnum):
    huggingface = "huggingface"
    onnx = "onnx"


@app.command("export", rich_help_panel="Models")
def export_command(
    format: Annotated[_ExportFormat, typer.Option(help="huggingface: CLIPModel with its processors. onnx: a file a tower.")],
    output: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("models/finetune"),
) -> None:
    """Write a model for Hugging Face transformers or ONNX, and check that its embeddings stay the same.

    In ONNX each tower is a file, and so is a text-conditioned pooling. Needs the extra `export` of this package.
    """
    from fast_goal.model.clip import Clip
    from fast_goal.model.export import export

    clip = Clip.load(model)
    found = export(clip, output, format.value)
    told = ", ".join(f"{part} {difference:.0e}" for part, difference in found.items())
    lost = clip.pooling is not None and "pooling" not in found
    left = "; without its text-conditioned pooling, which this format lacks" if lost else ""
    typer.echo(f"{output}: {format.value}; largest difference: {told}{left}")


@app.command("doctor", rich_help_panel="Set-up")
def doctor_command() -> None:
    """Check versions, device, torchvision operators, write access, free disk and offline switches."""
    from fast_goal import doctor

    raise typer.Exit(doctor.report())


def main() -> None:
    """Entry point: a FastGoalError is printed without a traceback and ends with exit status 1, or 75 where it is temporary."""
    try:
        app()
    except FastGoalError as error:
        print(f"fast-goal: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, TemporaryError) else 1)
    except KeyboardInterrupt:
        print("fast-goal: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
