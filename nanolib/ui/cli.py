"""The command line: ``nanolib run demo``, ``nanolib chat``, …

Settings (``--base.steps 100``) are removed from the command line before tyro parses the rest. User
errors print one line and exit with code 2. Heavy modules are imported only when needed.
"""

import ast
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from nanolib import config, launch, pipeline, takeover
from nanolib.progress import Line
from nanolib.rundir import Run, write_atomic
from nanolib.ui import runs

FAILED, USERS_MISTAKE, INTERRUPTED = 1, 2, 130  # exit codes

ProfileName = Annotated[Positional[str], arg(metavar="PROFILE")]
RunName = Annotated[str | None, arg(metavar="NAME", help="A run's name or path. [last opened]")]
TAKEN = arg(name="from", metavar="RUN", help="Take over finished stages of this run.")
SourceName = Annotated[str | None, TAKEN]
ModelName = Annotated[str | None, arg(metavar="STAGE", help="The model of this stage. [the last]")]


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: a stage saves first
    if "UV_RUN_RECURSION_DEPTH" in os.environ:
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        first = 2 if "bench" in arguments[:1] else len(arguments)  # a script parses the rest
        words, overrides = config.split_settings(arguments[:first])
        commands = Commands(overrides, arguments[first:])
        names = [name for name in vars(Commands) if not name.startswith("_")]
        tyro.extras.subcommand_cli_from_dict(
            {name: getattr(commands, name) for name in names},
            prog="nanolib",
            description="Build a small ChatGPT from end to end. Begin with: nanolib run demo",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # such as `nanolib settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, launch.WorkerError, pipeline.ChapterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USERS_MISTAKE if isinstance(error, ValueError) else FAILED
    return 0


def _end_with(parent: int) -> None:
    """Stop when the parent `uv run` dies: its SIGKILL is not forwarded to us."""
    pause = threading.Event()  # not time.sleep: tests that call `main` replace it
    while os.getppid() == parent:
        pause.wait(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Commands:
    """One method per command; `overrides` maps dotted paths to the settings given."""

    overrides: dict[str, Any]
    rest: Sequence[str]  # the words after `bench NAME`

    def run(
        self,
        profile: ProfileName,
        run: RunName = None,
        source: SourceName = None,
        detach: bool = False,
        dry_run: bool = False,
        on: Annotated[str | None, arg(metavar="MACHINE")] = None,
    ) -> None:
        """Run all stages of a profile, from text to chat, chapter by chapter.

        The same command resumes an interrupted run. Any setting may follow by its dotted
        path (--base.steps 100); --depth N, --mirror FOLDER and --nproc RANKS are short forms.

        Args:
            profile: A file in runs/, such as demo.
            detach: Run in the background, even after this terminal closes; see nanolib watch.
            dry_run: Check chapters, settings, memory and data; write and train nothing.
            on: With --dry-run: the target machine, such as 8xH100. [this one]
        """
        asked = (profile, _absolute(run), self.overrides)
        if dry_run and (detach or source):
            raise ValueError("--dry-run only checks: leave --detach and --from out")
        if on is not None and not dry_run:
            raise ValueError("--on names the machine of a --dry-run; a run runs here")
        if dry_run:
            print("\n".join(pipeline.dry_run(*asked, on)))
            return
        if source is not None:
            self._open(run, profile, source)
        (pipeline.detach if detach else pipeline.run)(*asked)

    @staticmethod  # tyro rejects methods whose only parameter is self
    def runs() -> None:
        """List all runs: profile, stages finished, size and last change."""
        print(runs.table())

    def watch(self, run: RunName = None) -> None:
        """Follow a run until it ends, from any terminal; Ctrl-C does not stop the run."""
        pipeline.watch(self._open(run))

    def plan(
        self,
        profile: Annotated[str, arg(metavar="PROFILE")] = "speedrun",
        on: Annotated[str, arg(metavar="MACHINE", help="Such as 8xH100 or A100.")] = "8xH100",
    ) -> None:
        """Estimate a run: tokens, FLOPs, memory, and each stage's time, dollars and disk.

        --depth 26 sets the size, --dollars-per-hour the machine's price (default: $3 per device);
        with --mirror DIR, conversations and problems are counted too.
        """
        from nanolib import accounting, planning
        from nanolib.stages import text

        machine = accounting.Machine.parse(on)
        run = Run.peek(profile, None, self.overrides)
        print("\n".join(planning.plan(run.config, machine, text.known(run))))

    def mirror(
        self,
        profile: ProfileName,
        folder: Annotated[Positional[Path], arg(metavar="DIR")],
        check: Annotated[bool, arg(help="Fetch nothing; exit code 1 for a bad file.")] = False,
    ) -> None:
        """Download a profile's data into a folder for --mirror; the same command resumes.

        With --check, compare the folder with its manifest.json.
        """
        from nanolib import mirror
        from nanolib.stages import text

        resolved = config.resolve(profile, self.overrides)
        if resolved.recipe.data.source == "toyworld":
            raise ValueError(f"profile {profile} writes its own data and needs no mirror")
        asked = (resolved, text.tables(resolved.recipe), folder)
        if check:
            problems = mirror.check(*asked)
            print("\n".join(problems) or f"{folder} is complete and undamaged")
            sys.exit(FAILED if problems else 0)
        with contextlib.closing(Line()) as line:
            mirror.fill(*asked, lambda *now: line.show(f"mirror  {now[-1]}"), link=False)
            line.say(f"{folder} is complete: give --mirror {folder}")

    def stage(
        self,
        name: Annotated[Positional[str], arg(metavar="NAME")],
        run: RunName = None,
        of: ModelName = None,
        source: SourceName = None,
        profile: Annotated[str | None, arg(metavar="PROFILE")] = None,
    ) -> None:
        """Run one stage and the unfinished stages it depends on, without notebooks.

        Args:
            name: One of data, tokenizer, shards, base, mid, sft, grpo, eval, report.
            profile: Open the run of this profile; create it if there is none.
        """
        opened = self._open(run, profile, source)
        with contextlib.closing(Line()) as line:
            try:
                result = launch.stage(name, opened, of, watch=line)
            except KeyboardInterrupt:
                line.say("stopped and saved; run the same command to go on")
                raise
        print("\n".join(f"{key}: {value}" for key, value in result.items()))

    def chat(
        self,
        run: RunName = None,
        of: ModelName = None,
        prompt: Annotated[str | None, arg(aliases=["-p"], metavar="QUESTION")] = None,
        temperature: float = 0.6,
    ) -> None:
        """Chat with a run's model: Ctrl-C stops an answer, Ctrl-D quits, /help lists commands.

        Args:
            prompt: Ask this one question, print the answer and exit.
            temperature: 0 takes the likeliest token; 1 samples from the unscaled distribution.
        """
        from nanolib.session import Session
        from nanolib.ui import terminal

        opened = self._open(run)
        with Session.open(opened, of, temperature=temperature) as session:
            if prompt is None:
                terminal.talk(session, opened.path)
            else:
                terminal.answer(session, prompt)

    def serve(
        self,
        run: RunName = None,
        of: ModelName = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        temperature: float = 0.6,
        api_key: str | None = None,
        cors: str | None = None,
    ) -> None:
        """Serve a chat page and an OpenAI-compatible API (/v1) for a run's model; Ctrl-C stops it.

        Args:
            host: The address to listen on; the default is local, 0.0.0.0 accepts the network.
            port: The port to listen on; 0 picks a free one.
            temperature: For requests that give none; also the page's initial setting.
            api_key: Require this key.
            cors: An origin whose pages may call the API.
        """
        from nanolib.ui import server

        server.serve(self._open(run), of, host, port, temperature, api_key=api_key, cors=cors)

    def report(self, run: RunName = None, against: str | None = None) -> None:
        """Rewrite a run's report card; with --against, print it side by side with another's."""
        from nanolib import report

        opened = self._open(run)
        if against is not None:
            print(report.compare(opened, Run.load(_absolute(against))))
        else:
            report.build(opened)
            print(opened.path / "report.md")

    def export(self, run: RunName = None, of: ModelName = None, out: Path | None = None) -> None:
        """Export a model to Hugging Face's transformers format, in export/ of its run or --out."""
        from nanolib import export

        print(export.export(self._open(run), of, out))

    def pack(self, out: Path = Path("nanolib.md"), tests: bool = False) -> None:
        """Write the code base as one Markdown file, to ask a language model about it."""
        from nanolib.ui import packed

        write_atomic(out, text := packed.pack(tests))
        thousands = round(len(text.encode()) / 4000)  # about four bytes per token
        print(f"{out}: {len(text):,} characters, about {thousands:,},000 tokens")

    def notebooks(self, refresh: bool = False, check: bool = False) -> None:
        """Keep notebooks/NN_*.py and their .ipynb twins in sync.

        --check lists the pairs that differ (exit code 2 if any do); --refresh executes profile
        demo and renews every .ipynb with its outputs.
        """
        if refresh == check:
            raise ValueError("nanolib notebooks needs one of --refresh and --check")
        pairs = _from_checkout("notebooks.pairs")
        pairs.refresh(self.overrides) if refresh else pairs.check()

    def bench(self, name: Positional[str] = "") -> None:
        """Run a measurement from runs/bench/; without a NAME, list them.

        Arguments after NAME are passed to it: nanolib bench NAME --help.
        """
        folder = config.REPOSITORY / "runs" / "bench"
        scripts = {path.stem: path for path in sorted(folder.glob("*.py"))}
        if name in scripts:
            _from_checkout(f"runs.bench.{name}").main(list(self.rest))
        elif name:
            raise ValueError(f"there is no measurement {name!r}; there are {', '.join(scripts)}")
        else:
            for stem, path in scripts.items():
                about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                print(f"{stem:<10} {about.splitlines()[0]}")

    def settings(self, profile: ProfileName = "demo") -> None:
        """List every setting by its dotted path, with its value in a profile."""
        resolved = config.resolve(profile, self.overrides)
        flat = config.flatten(resolved.recipe) | config.flatten(resolved.machine, "machine.")
        for path, value in flat.items():
            print(f"{path:<28} {config.as_text(value)}")

    def _open(self, run: str | None, profile: str | None = None, source: str | None = None) -> Run:
        """Open the profile's run, else an existing one; take over stages of `source`."""
        other = Run.load(_absolute(source)) if source else None  # fails before a run is made
        asked = (_absolute(run), self.overrides)
        opened = Run.open(profile, *asked) if profile else Run.load(*asked)
        if other is not None:
            with contextlib.closing(Line()) as line:
                line.say("\n".join(takeover.take_over(opened, other, line)))
        return opened


def _from_checkout(module: str) -> ModuleType:
    """Import a module that is in the checkout but not in the package, such as notebooks.pairs."""
    sys.path.insert(0, str(config.REPOSITORY))
    return importlib.import_module(module)


def _absolute(run: str | None) -> str | None:
    """Make a run's path absolute; a plain run name stays as it is."""
    return str(Path(run).expanduser().absolute()) if run and "/" in run else run
