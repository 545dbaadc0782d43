"""The command line is the configuration dataclass: names, types, defaults and help come from there alone."""

import os
import shlex
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from residscope.errors import UsageError
from residscope.options import field_docstrings, from_flat, parse_options, to_flat, to_toml, with_values


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Which model: 100% of the text below a field is its help."""
    out: Path | None = None
    """Where the result goes."""
    max_tokens: int = 1_000
    """How many tokens."""
    lr: float = 1e-4
    """Learning rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the numbers."""
    layers: tuple[int, ...] = ()
    """Which layers."""
    shuffle: bool = True
    """Whether to shuffle."""


def parse(*argv: str) -> Config:
    return parse_options(Config, argv, prog="tool", description="A tool.")


def test_defaults_and_types() -> None:
    assert parse("--model", "m") == Config(model="m")
    words = shlex.split("--model m --out a/b --max-tokens 7 --lr 2e-3 --dtype bfloat16 --layers 1 2 3 --no-shuffle")
    assert parse(*words) == Config(
        model="m", out=Path("a/b"), max_tokens=7, lr=2e-3, dtype="bfloat16", layers=(1, 2, 3), shuffle=False
    )


def test_a_flag_of_several_words_that_is_given_again_adds_to_them_and_one_of_one_word_is_replaced() -> None:
    words = shlex.split("--model m --layers 1 2 --max-tokens 1 --layers 3 --max-tokens 2 --layers=4")
    assert parse(*words) == Config(model="m", max_tokens=2, layers=(1, 2, 3, 4))


def test_repeated_words_win_over_the_file_together(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("layers = [9]\n")
    found = parse("--config", str(tmp_path / "c.toml"), "--model=m", "--layers", "1", "--layers", "2")
    assert found.layers == (1, 2)


def test_a_bad_command_line_is_one_line_that_names_the_nearest_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([], "missing --model"),
        (
            ["--model", "m", "--max-tokns=5", "--lr", "1"],
            "unrecognized arguments: --max-tokns=5 (did you mean --max-tokens?)",
        ),
        (["--model", "m", "--zzz"], "unrecognized arguments: --zzz"),
        (["--model", "m", "7"], "unrecognized arguments: 7"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse(*words)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.err == f"tool: error: {said}; see `tool --help`\n"
        assert not printed.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--model"),
        (["--model", "m", "--max-tokens", "many"], "--max-tokens"),
        (["--model", "m", "--dtype", "int8"], "int8"),
        (
            ["--model", "m", "--max-token", "3"],
            "--max-token",
        ),  # an abbreviation changes meaning as flags are added
    ],
)
def test_bad_words_exit_with_2_and_name_the_flag(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_words_that_are_not_utf8_are_refused() -> None:
    """Python reads such bytes as halves of surrogate pairs, which no file of ours could hold."""
    with pytest.raises(UsageError, match=r"'caf\\udce9': should be UTF-8"):
        parse("--model", os.fsdecode(b"caf\xe9"))


def test_help_shows_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "100% of the text below a field is its help. (required)" in shown
    assert "How many tokens. (default: 1000)" in shown
    assert "--shuffle, --no-shuffle" in shown
    assert field_docstrings(Config)["lr"] == "Learning rate."


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "from file"\nmax-tokens = 5\nlayers = [4, 5]\nlr = 1\nout = "x"\n')
    assert parse("--config", str(file), "--max-tokens", "6") == Config(
        model="from file", max_tokens=6, layers=(4, 5), lr=1.0, out=Path("x")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle = 'm'", "unknown option 'modle'"),
        ("model = 'm'\nmax_tokens = 'many'", "max_tokens should be int, found 'many'"),
        ("model = 'm'\nmax_tokens = true", "max_tokens should be int, found True"),
        ("model = 'm'\ndtype = 'int8'", "dtype should be 'float32' | 'bfloat16'"),
        ("model = 'm'\nlayers = [1, 'a']", "layers should be int, found 'a'"),
        ("model = 'm'\nlayers = [true]", "layers should be int, found True"),
        ("model = 'm'\nmax_tokens = 1\nmax-tokens = 2", "max_tokens is given twice"),
        ("model = ", "not valid TOML"),
        ("model = '\xff'", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"c\.toml") as error:
        parse("--config", str(file))
    assert said in str(error.value)


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.toml").write_text("model = '~/m'\nout = '~/a'")
    assert parse("--config", str(tmp_path / "c.toml")) == Config(model="~/m", out=Path("/home/me/a"))
    for word, path in (("~/b", "/home/me/b"), ("a/~", "a/~"), ("~nobody/b", "~nobody/b"), ("./~/b", "./~/b")):
        assert parse("--model=m", f"--out={word}").out == Path(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        parse("--config", str(tmp_path / "nowhere.toml"))


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    config = Config(model='quo"te ü \x7f \n 🙂', out=Path("o"), layers=(1, 2), shuffle=False, lr=6.25e-10)
    file = tmp_path / "c.toml"
    file.write_text(to_toml(vars(config)), encoding="utf-8")
    assert parse("--config", str(file)) == config


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large it is. More is slower."""

    width: int = 4
    """Columns."""
    depth: int = 2
    """Rows."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UsageError(f"--width should be at least 1, found {self.width}")


@dataclass(frozen=True, kw_only=True)
class Nested:
    FIRST_FLAGS: ClassVar = ("depth", "name")

    name: str
    """A name."""
    size: Size = Size()
    colour: str = "red"
    """A colour."""


def parse_nested(*argv: str) -> Nested:
    return parse_options(Nested, argv, prog="tool", description="A tool.")


def test_the_fields_of_a_group_are_flags_of_their_own() -> None:
    assert parse_nested("--name", "n", "--width", "9") == Nested(name="n", size=Size(width=9))
    config = from_flat(Nested, {"name": "n", "depth": 3})
    assert config == Nested(name="n", size=Size(depth=3))
    assert to_flat(config) == {"name": "n", "width": 4, "depth": 3, "colour": "red"}
    assert with_values(config, width=5, colour="blue") == Nested(name="n", size=Size(width=5, depth=3), colour="blue")
    with pytest.raises(UsageError, match="--width"):
        with_values(config, width=0)
    with pytest.raises(TypeError, match="weight"):
        from_flat(Nested, {"name": "n", "weight": 3})


def test_a_file_may_use_tables_or_flat_names_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "n"\ndepth = 7\n[size]\nwidth = 8\n')
    assert parse_nested("--config", str(path)) == Nested(name="n", size=Size(width=8, depth=7))
    assert parse_nested("--config", str(path), "--width", "1").size == Size(width=1, depth=7)
    for text, said in (
        ("[size]\nheight = 1\n", "unknown option 'height'"),
        ("[size]\nname = 'n'\n", r"name is not an option of \[size\]: it belongs above all tables"),
        ("width = 1\n[size]\nwidth = 2\n", "width is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            parse_nested("--config", str(path))


def test_help_shows_the_first_flags_and_then_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_nested("--help")
    text = capsys.readouterr().out
    order = ["most used:", "--depth", "--name", "How large it is:", "--width", "other:", "--colour"]
    places = [
        text.index(f"  {word} " if word.startswith("-") else f"\n{word}\n", text.index("options:")) for word in order
    ]
    assert places == sorted(places)


def test_version_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_nested("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tool (residscope {version('residscope')})\n"


def test_seeds_that_torch_does_not_take_are_refused_by_every_command() -> None:
    from analysis.config import StatisticsOptions
    from harvest.config import ControlConfig, ModelConfig
    from harvest.lens.config import FitLensConfig
    from train.config import DataConfig

    lens = partial(FitLensConfig, weights=ModelConfig(model="m"), out=Path("x"))
    for config in (StatisticsOptions, ControlConfig, DataConfig, lens):
        for seed in (-1, 2**63):
            with pytest.raises(UsageError, match=f"--seed should be at least 0 and below 2.63, found {seed}"):
                config(seed=seed)
