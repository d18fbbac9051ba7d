from __future__ import annotations

import argparse
from typing import Literal

import pytest
from pydantic import Field, model_validator

from mimscale.config.base import Strict
from mimscale.errors import UserError
from mimscale.evals.options import add_options, config_of, default_suffix


class Config(Strict):
    steps: int = Field(ge=1, description="how many")
    base_lr: float = Field(0.1, gt=0, description="at 100 % of the batch")
    grid: tuple[float, ...] = Field((1.0, 0.1), description="to choose from")
    norm: Literal["bn", "ln"] = Field("bn", description="before the head")
    augment: bool = Field(False, description="random crops")
    limit: int | None = Field(None, description="of samples")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.limit is not None and self.limit < self.steps:
            raise ValueError("limit is below steps; raise it")
        return self


def parse(*words: str) -> Config:
    parser = argparse.ArgumentParser(prog="test")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seed", type=int, default=3)
    add_options(parser, Config)
    return config_of(vars(parser.parse_args(["run", *words])), Config)


def test_options_become_the_config() -> None:
    assert parse("--steps", "4") == Config(steps=4)
    words = "--steps 4 --base-lr 2e-3 --grid 3 4.5 --norm ln --augment --limit 9"
    assert parse(*words.split()) == Config(steps=4, base_lr=2e-3, grid=(3.0, 4.5), norm="ln", augment=True, limit=9)
    assert not parse("--steps", "4", "--no-augment").augment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "--steps 0: input should be greater than or equal to 1"),
        ("--steps x", "--steps x: input should be a valid integer"),
        ("--steps 4 --base-lr 0", "--base-lr 0: input should be greater than 0"),
        ("--steps 4 --base-lr nan", "--base-lr nan: input should be"),
        ("--steps 4 --grid 1 a", "--grid a: input should be a valid number"),
        ("--steps 4 --limit 2", "limit is below steps; raise it"),
    ],
)
def test_a_mistake_names_the_option_the_value_and_the_rule(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*words.split())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--norm", "gn"], "invalid choice: 'gn'"), ([], "required: --steps")):
        with pytest.raises(SystemExit):
            parse("--limit", "3", *words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--base-lr X at 100 % of the batch (default 0.1)" in text and "--steps N how many" in text


def test_a_file_name_holds_what_is_not_at_its_default() -> None:
    assert default_suffix(Config(steps=4, norm="ln", grid=(1.0, 0.1))) == "-steps4-normln"
    assert default_suffix(Config(steps=1, grid=(3.0, 0.5))) == "-steps1-grid3.0+0.5"
