"""The `longllava` command: chat, convert, export, push, evaluate, train.

Every heavy import stands inside the command that needs it, so that `longllava --help` answers at once.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from longllava.evaluation import efficiency

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate_app = typer.Typer(no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate", help="Measure a model.")
evaluate_app.add_typer(efficiency.app, name="efficiency")

# A checkout has the pocket model beside this folder; an installed wheel does not, and asks for --model.
POCKET = Path(__file__).resolve().parent.parent / "spaces_demo" / "pocket"


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """LongLLaVA: questions about many pictures, long videos and very large images."""
    context.obj = debug
    # Before torch is imported: threads that spin while they wait take the cores from each other as soon as anything
    # else runs on them, and a scan of 0.2 s was seen to take 10 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Make an exception of the command one line on stderr and exit code 1, unless `--debug` asks for the traceback.

    Errors of usage (a wrong option) never come here: typer raises them before the command runs.
    """

    @functools.wraps(command)
    def run(context: typer.Context, **options: Any) -> None:
        try:
            command(context, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if context.obj:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"longllava: {message}", err=True)
            raise typer.Exit(1) from None

    return run


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Name the model in errors of files and network, which otherwise say only that something was not found.

    The bars of the libraries are hidden meanwhile: a model on this machine is loaded before one can read them.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise OSError(f"model {model}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Name the extra of this package that brings a module which is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'longllava[{extra}]' brings it") from error


def model_or_pocket(model: str | None) -> str:
    """What `--model` names, else the pocket model, where this is a checkout."""
    if model is None and not POCKET.is_dir():
        raise typer.BadParameter("which model? --model takes a folder or a Hub id")
    return model or str(POCKET)


@app.command()
@one_line_errors
def chat(
    context: typer.Context,
    media: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, videos, folders of them, URLs, in this order.", metavar="MEDIA"),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="One question; without it, a conversation, line by line.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id. In a checkout: spaces_demo/pocket.")
    ] = None,
    tokens_per_image: Annotated[
        int | None, typer.Option(help="Tokens of a picture: a square such as 144 or 36. By default the model's.")
    ] = None,
    tokens_per_frame: Annotated[
        int | None, typer.Option(help="The same for a frame of a video. By default that of a picture.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of each video, evenly spaced.", min=1)] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of a video; --frames is then the limit.")
    ] = None,
    tiles: Annotated[
        int,
        typer.Option(help="Cut each picture into at most so many tiles besides showing it whole; 0: do not.", min=0),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")] = "auto",
    session: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this file, if it exists, and keep there what was read and said.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Ask about pictures and videos: one question, or a conversation.

    The answer goes to the standard output while it is written; what each picture and video costs, and how much of the
    model's window is taken, goes to the standard error.

    longllava chat a.jpg b.jpg -q "What changed?"

    longllava chat holiday/ film.mp4 --frames 32

    longllava chat film.mp4 --session film.session, and tomorrow: longllava chat --session film.session
    """
    import sys

    import torch
    from transformers.utils import logging

    from longllava.modeling_longllava import LongLlavaForConditionalGeneration, LongLlavaSession
    from longllava.processing import LongLlavaProcessor

    from .chat import describe_costs, describe_window, find_media, read_media

    found = find_media(media or [])
    source = model_or_pocket(model)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype is auto, float32, bfloat16 or float16, not {dtype}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.set_verbosity_error()
    with loading(source):
        processor = LongLlavaProcessor.from_pretrained(source)
        network = LongLlavaForConditionalGeneration.from_pretrained(source, dtype=dtype).to(device).eval()
    if session is not None and session.exists():
        talk = LongLlavaSession.load(session, network, processor)
    else:
        talk = LongLlavaSession(network, processor)
    talk.options = {
        "tokens_per_image": tokens_per_image,
        "tokens_per_frame": tokens_per_frame,
        "sub_images": tiles > 0,
        "max_tiles": tiles or None,
        "num_frames": None if fps else frames,
        "fps": fps,
        "max_frames": frames if fps else None,
    }
    for line in describe_costs(read_media(talk, found)):
        typer.echo(line, err=True)
    if session is not None and found:
        talk.save(session)
    window = network.config.text_config.max_position_embeddings
    for text in questions(question):
        sys.stderr.flush()
        try:
            for piece in talk.stream(text, max_new_tokens=max_new_tokens):
                typer.echo(piece, nl=False)
        except ValueError as error:
            # Pictures that cannot be read end it; a question that cannot be asked does not.
            if question is not None:
                raise
            typer.echo(f"longllava: {error}", err=True)
            continue
        typer.echo()
        typer.echo(describe_window(talk.num_tokens, window), err=True)
        if session is not None:
            talk.save(session)


def questions(question: str | None) -> Iterator[str]:
    """The one question, or what is typed, line by line, until the end of input or an interrupt."""
    if question is not None:
        yield question
        return
    import sys

    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (arrow keys and history in input())

    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text:
            yield text


@app.command()
@one_line_errors
def convert(
    context: typer.Context,
    src: Annotated[str, typer.Argument(help="Original checkpoint (llava_jamba): folder or Hub id.")],
    dst: Annotated[Path, typer.Argument(help="New folder, complete for the Hub.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP tower (folder or Hub id), where the checkpoint names none that exists.")
    ] = None,
    image_token_id: Annotated[
        int | None, typer.Option(help="Id of the piece that becomes <image>. By default an unused one.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer (folder or Hub id), where the checkpoint has none.")
    ] = None,
) -> None:
    """Convert an original LongLLaVA checkpoint to this package's layout, file by file."""
    from longllava.modeling_longllava.convert import convert_checkpoint

    written = convert_checkpoint(
        src, dst, vision_tower=vision_tower, image_token_id=image_token_id, tokenizer=tokenizer
    )
    typer.echo(f"written: {written}")


@app.command()
@one_line_errors
def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: folder or Hub id.")],
    dst: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a folder that works anywhere with trust_remote_code=True, without this package."""
    from longllava.modeling_longllava.hub import export_model

    typer.echo(f"written: {export_model(model, dst)}")


@app.command()
@one_line_errors
def push(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: folder or Hub id.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
) -> None:
    """Export a model and upload it to the Hub, with the login of `hf auth login`."""
    from longllava.modeling_longllava.hub import push_model

    typer.echo(f"uploaded: {push_model(model, repo_id, private=private)}")


@evaluate_app.command("pocket")
@one_line_errors
def evaluate_pocket(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id. In a checkout: spaces_demo/pocket.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Questions of each task.", min=1)] = 1000,
    output: Annotated[Path | None, typer.Option(help="Also write the accuracies to this JSON file.")] = None,
) -> None:
    """Measure the pocket model on handwritten digits that it has never seen."""
    from longllava.evaluation import pocket

    source = model_or_pocket(model)
    with needing("eval"), loading(source):
        accuracies = pocket.evaluate_pocket(source, rows, output)
    typer.echo(pocket.table(accuracies, rows))


def numbers(option: str, text: str, kind: type) -> list:
    """The numbers of an option such as `100,200,300`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--{option} takes numbers with commas between them, not {text!r}") from None


@evaluate_app.command("needle")
@one_line_errors
def evaluate_needle(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id. In a checkout: spaces_demo/pocket.")
    ] = None,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="A video or a folder of pictures, sampled evenly. By default drawn digits.", metavar="MEDIA"
        ),
    ] = None,
    needle: Annotated[
        list[str] | None,
        typer.Option(
            help="A needle's picture, with a --question and an --answer; several times for several. Or one JSON file: "
            "a list of objects with picture, question and answer. By default drawn digits in a red frame.",
            metavar="PICTURE",
        ),
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="What is asked about the needle.")] = None,
    answer: Annotated[
        list[str] | None, typer.Option(help="The right answer; case, spaces and the final dot do not count.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Frames of the haystacks.")
    ] = "100,200,300,400,500,600,700,800,900,1000,2000",
    depths: Annotated[
        str, typer.Option(help="Per cent of the frames before the needle.")
    ] = "0,10,20,30,40,50,60,70,80,90,100",
    trials: Annotated[
        int | None, typer.Option(help="Answers in each cell. By default 20, or one for each --needle.", min=1)
    ] = None,
    tokens_per_frame: Annotated[
        int | None, typer.Option(help="A square such as 144 or 36. By default the model's.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the answers, needle.json and needle.png.")] = Path(
        "runs/needle"
    ),
    seed: Annotated[int, typer.Option(help="Of the drawn digits.", min=0)] = 2024,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Trials at a time, each in a process of one thread. By default one per core for the pocket model, "
            "else 1.",
            min=1,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Find a needle in a haystack of pictures, at every length and depth; draw the heat map.

    What was answered is kept: the same command goes on where it was stopped.

    longllava evaluate needle

    longllava evaluate needle --haystack film.mp4 --needle cat.jpg --question "What is in the box?" --answer "A cat"
    """
    pictures, asked, expected = needle or [], question or [], answer or []
    from_file = [picture for picture in pictures if picture.endswith(".json")]
    if from_file and (len(pictures), len(asked), len(expected)) != (1, 0, 0):
        raise typer.BadParameter(f"{from_file[0]} holds the needles: give no other --needle, --question or --answer")
    if not from_file and not len(pictures) == len(asked) == len(expected):
        raise typer.BadParameter(
            f"{len(pictures)} --needle, {len(asked)} --question and {len(expected)} --answer: give as many of each"
        )
    frames, shares = numbers("lengths", lengths, int), numbers("depths", depths, float)
    source = model_or_pocket(model)
    with needing("eval"):
        import torch

        from longllava.evaluation import needle as needles
        from longllava.modeling_longllava import LongLlavaForConditionalGeneration
        from longllava.processing import LongLlavaProcessor
    if from_file:
        given = needles.read_needles(from_file[0])
    else:
        given = [needles.Needle(*parts) for parts in zip(pictures, asked, expected, strict=True)]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(source):
        processor = LongLlavaProcessor.from_pretrained(source)
        network = LongLlavaForConditionalGeneration.from_pretrained(source, dtype=dtype).to(device).eval()
    with needing("eval"):
        report = needles.evaluate_needle(
            network,
            processor,
            output,
            lengths=frames,
            depths=shares,
            haystack=haystack,
            needles=given or None,
            trials=trials,
            tokens_per_frame=tokens_per_frame,
            jobs=jobs or (torch.get_num_threads() if source == str(POCKET) and device == "cpu" else 1),
            seed=seed,
        )
    typer.echo(needles.table(report))
    typer.echo(f"written: {output / 'needle.json'}, {output / 'needle.png'}", err=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
@one_line_errors
def train(context: typer.Context) -> None:
    """Train by a recipe: --config recipes/X.yaml; any further --option wins over the recipe's."""
    with needing("train"):
        from longllava.trainers.sft import main as train_by_recipe

    train_by_recipe(context.args)


# The measurements stand in a file of their own, where they also run without this one.
for measurement in efficiency.app.registered_commands:
    assert measurement.callback is not None
    measurement.callback = one_line_errors(measurement.callback)
