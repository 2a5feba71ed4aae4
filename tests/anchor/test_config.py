import argparse
import json
from dataclasses import asdict, fields
from typing import get_args

import numpy as np
import pytest
import torch

from videoanchor_triton.anchor.config import Score, VideoAnchorConfig
from videoanchor_triton.anchor.solver import SolverOptions
from videoanchor_triton.app.commands.shared import add_config_options, config_of
from videoanchor_triton.integrations.errors import InputError


def norm_scorer(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.norm(dim=1) / tokens.norm(dim=1).amax()


def test_alphas_have_no_default():
    with pytest.raises(TypeError, match="alpha_k"):
        VideoAnchorConfig()  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="positional"):
        VideoAnchorConfig(1.0, 2.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["internvl2-8b", "InternVL2-8B"])
def test_preset_holds_the_published_alphas(name):
    config = VideoAnchorConfig.preset(name)
    assert (config.alpha_q, config.alpha_k, config.alpha_v) == (4.0, 9.5, 2.5)
    assert (config.n_clusters, config.alpha_e, config.alpha_z, config.affine) == (24, 800.0, 800.0, True)
    assert VideoAnchorConfig.preset(name, alpha_q=0.0, n_clusters=8).alpha_q == 0.0


def test_preset_invents_nothing():
    with pytest.raises(ValueError, match=r"'qwen3-vl-8b', only for internvl2-8b; give alpha_k and alpha_v"):
        VideoAnchorConfig.preset("qwen3-vl-8b")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha_k": -1.0}, ValueError, "alpha_k must be finite and >= 0"),
        ({"alpha_v": float("nan")}, ValueError, "alpha_v must be finite"),
        ({"alpha_q": float("inf")}, ValueError, "alpha_q must be finite"),
        ({"alpha_k": "9.5"}, TypeError, "alpha_k must be a number"),
        ({"alpha_k": True}, TypeError, "alpha_k must be a number"),
        ({"n_clusters": 0}, ValueError, "n_clusters must be >= 1"),
        ({"n_clusters": 2.0}, TypeError, "n_clusters must be an integer"),
        ({"pca_rank": 0}, ValueError, "pca_rank must be >= 1"),
        ({"random_state": -1}, ValueError, "random_state must be >= 0"),
        ({"random_state": 2**32}, ValueError, "random_state must be >= 0 and <= 4294967295"),
        ({"decode": "always"}, ValueError, "decode must be one of 'persist', 'prefill'"),
        ({"scorer": "pca"}, ValueError, "scorer must be one of 'ssc', 'knn', 'kmeans', 'uniform' or a function"),
        ({"assign_labels": "qr"}, ValueError, "assign_labels must be one of 'cluster_qr', 'kmeans', 'discretize'"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be >= 1"),
        ({"scorer": "kmeans", "n_clusters": "auto"}, ValueError, 'n_clusters="auto" needs the affinity'),
        (
            {"score": "both"},
            ValueError,
            "score must be one of 'published', 'size', 'row_sum', 'projector', 'cross_frame', 'permuted', "
            "'cross_frame_permuted', got 'both'",
        ),
        (
            {"score": "size", "scorer": "kmeans"},
            ValueError,
            "score='size' needs scorer=\"ssc\" or \"knn\", got scorer='kmeans'",
        ),
        ({"score": "cross_frame", "scorer": "uniform"}, ValueError, "got scorer='uniform': leave score out"),
        ({"score": "row_sum", "scorer": norm_scorer}, ValueError, "score='row_sum' needs scorer=\"ssc\""),
        (
            {"score": "size", "assign_labels": "discretize", "arithmetic": "authors"},
            ValueError,
            'arithmetic="authors" needs score="published", got score=\'size\'',
        ),
        ({"tol": 0.0}, ValueError, "tol must be finite and > 0"),
        ({"arithmetic": "authors"}, ValueError, 'needs affine=True and assign_labels="discretize"'),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        VideoAnchorConfig(**{"alpha_k": 1.0, "alpha_v": 1.0, **settings})


def test_what_is_not_the_paper_is_not_reproduced():
    assert VideoAnchorConfig(alpha_k=1, alpha_v=1).reproduce().score == "published"
    with pytest.raises(ValueError, match="needs score=\"published\", got score='cross_frame'"):
        VideoAnchorConfig(alpha_k=1, alpha_v=1, score="cross_frame").reproduce()


def test_the_settings_of_the_solver_are_among_them():
    config, defaults = VideoAnchorConfig(alpha_k=1, alpha_v=1), SolverOptions()
    assert isinstance(config, SolverOptions)
    assert {field.name: getattr(config, field.name) for field in fields(SolverOptions)} == asdict(defaults)


def test_to_dict_is_ready_for_json():
    config = VideoAnchorConfig(alpha_k=np.float32(9.5), alpha_v=2.5, n_clusters=np.int64(8), score="cross_frame")  # pyright: ignore[reportArgumentType]
    values = json.loads(json.dumps(config.to_dict()))
    assert VideoAnchorConfig(**values) == config
    custom = VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer=norm_scorer)
    assert custom.to_dict()["scorer"].endswith("test_config.norm_scorer")


def test_to_dict_names_a_scorer_object_by_its_class():
    scorer = torch.nn.Flatten()
    assert VideoAnchorConfig(alpha_k=1, alpha_v=1, scorer=scorer).to_dict()["scorer"].endswith("flatten.Flatten")


def parsed(*options: str) -> VideoAnchorConfig:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return config_of(parser.parse_args(["--alpha-k", "1", "--alpha-v", "1", *options]))


def test_score_is_an_option_of_the_command_line():
    assert parsed().score == "published"
    assert [parsed("--score", score).score for score in get_args(Score)] == [*get_args(Score)]
    with pytest.raises(InputError, match="score='size' needs scorer=\"ssc\""):
        parsed("--score", "size", "--scorer", "kmeans")
