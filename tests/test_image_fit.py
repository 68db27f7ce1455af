"""Laws of a fit: what its points follow, what drives its chains, and that it goes on as if never stopped."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import SAMPLERS, SMALL, centres, make_fit, make_photo, photo_of, predictions, residuals
from sampler_cases import p_value
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import fit as fits
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, load, load_field, make_settings, render, save
from nerfstudio_softmining.images.photo import Photo
from nerfstudio_softmining.mining import langevin
from nerfstudio_softmining.mining.langevin import ChainState
from nerfstudio_softmining.mining.priors import sobel
from nerfstudio_softmining.mining.records import concatenate
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.samplers import langevin as chains
from nerfstudio_softmining.samplers.images import PixelSamples

EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)
FROZEN = {"learning_rate": 1e-30}
"""Settings with which a field stays as it is."""


def steps(fit: Fit, count: int) -> Fit:
    for _ in range(count):
        fit.step()
    return fit


def fields_are_equal(first: Fit, second: Fit) -> bool:
    """As they are, and as they are shown."""
    for ours, theirs in ((first.field, second.field), (first.average, second.average)):
        states = ours.state_dict(), theirs.state_dict()
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
            return False
    return True


def counts(fit: Fit, position: Tensor) -> Tensor:
    """How often each pixel holds a point, in a row."""
    height, width = fit.photo.size
    pixel = position.detach().long()
    assert ((pixel >= 0) & (pixel < torch.tensor((height, width)))).all()
    return torch.bincount(pixel[:, 0] * width + pixel[:, 1], minlength=height * width)


def follows(fit: Fit, law: Tensor, draws: int = 20_000) -> bool:
    """Whether the next points follow a law over pixels, given up to a factor."""
    samples = fit.run.draw(draws).pixels
    return p_value(counts(fit, samples.position), (law / law.sum()).flatten().double()) > 1e-4


def law_of_edges(fit: Fit, shift: int = 2) -> Tensor:
    """Canny's edges shifted at random, by loops."""
    height, width = fit.photo.size
    grey = (fit.photo.values[..., :3].mean(dim=-1) * 255).round().byte().numpy()
    law = np.zeros((height, width))
    for row, column in zip(*cv2.Canny(grey, 100, 200).nonzero(), strict=True):
        law[max(0, row - shift) : row + shift + 1, max(0, column - shift) : column + shift + 1] += 1
    return torch.from_numpy(law)


def law_of(sampler: str, fit: Fit) -> Tensor:
    """Density that a sampler with its default settings is known to draw from, by brute force."""
    uniform = torch.ones(fit.photo.size).double()
    if sampler.startswith("uniform") or sampler.startswith("evos"):
        return uniform
    if sampler.startswith("edge"):
        edges = law_of_edges(fit)
        return 0.5 * uniform / uniform.sum() + 0.5 * edges / edges.sum()
    q = residuals(fit).double()
    if sampler.startswith("multinomial"):
        q = q.abs().mean(dim=-1)
        return 0.1 * uniform / uniform.sum() + 0.9 * q / q.sum()
    error = q.square().mean(dim=-1)
    return (error >= error.flatten().sort(descending=True).values[round(0.2 * error.numel()) - 1]).double()


@pytest.mark.parametrize(
    "sampler",
    [
        "uniform",
        "uniform-weighted",
        "edge",
        "multinomial,refresh=3",
        "greedy,interval=3",
        "evos,selected_fraction=1,mutated_fraction=1",
        "evos,selected_fraction=1",
        "evos,mutated_fraction=1",
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_points_follow_the_density_that_is_known(sampler, channels):
    fit = steps(make_fit(sampler, make_photo(channels=channels), **FROZEN), 4)
    law = law_of(sampler, fit)
    plain = "uniform" in sampler or "evos" in sampler
    assert plain or (law / law.sum() - 1 / law.numel()).abs().sum() > 0.15  # or this would be no test
    assert follows(fit, law)


@pytest.mark.parametrize("sampler", ["multinomial,refresh=3", "greedy,interval=3"])
def test_maps_follow_the_error_of_the_last_look(sampler):
    fit = make_fit(sampler)
    before = law_of(sampler, fit)
    assert follows(fit, before)
    with torch.no_grad():
        for part in fit.field.parameters():
            part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    after = law_of(sampler, fit)
    assert follows(fit, before) and follows(fit, before)
    assert follows(fit, after) and not follows(fit, before)


def test_chains_start_anew_in_proportion_to_sobels_edges():
    fit = make_fit("langevin,reinit_fraction=1.0,uniform_fraction=0", batch=20_000, **FROZEN)
    assert follows(fit, torch.ones(fit.photo.size))
    fit.step()
    assert follows(fit, sobel(fit.photo.values))


def fitness(residual: Tensor) -> np.ndarray:
    """Squared error and that of the Laplacian, each over its mean, by loops."""
    values = residual.double().numpy()
    height, width, _ = values.shape
    laplacian = np.zeros_like(values)
    for row in range(height):
        for column in range(width):
            for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                beside = min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)
                laplacian[row, column] += values[beside] - values[row, column]
    parts = [(part**2).mean(axis=-1) for part in (values, laplacian)]
    return sum(part / part.mean() for part in parts)


def test_the_fittest_of_uniform_candidates_survive_and_others_join_at_random(monkeypatch):
    fit = steps(make_fit("evos", batch=100), 60)
    fit.run.state = fit.run.state._replace(next_evaluation=fit.run.state.steps)  # it evaluates anew
    expected, offered, joined = fitness(residuals(fit)), [], []
    images = fit.run.sampler.images
    draw = images.uniform
    monkeypatch.setattr(images, "uniform", lambda count: (offered.append(draw(count)), offered[-1])[1])
    for _ in range(200):
        samples = fit.run.draw(100).pixels
        candidates = [tuple(place) for place in offered[-1].position.tolist()]
        drawn = {tuple(place) for place in samples.position.tolist()}
        assert len(candidates) == 200 and len(drawn) == len(samples.position) == 100 and drawn <= set(candidates)
        ranked = sorted(candidates, key=lambda place: -expected[int(place[0]), int(place[1])])
        worst = expected[tuple(int(x) for x in ranked[49])]
        fitter = {place for place in candidates if expected[int(place[0]), int(place[1])] > worst * (1 + 1e-5)}
        assert fitter <= drawn  # the others are of the same pixel
        joined += [rank for rank, place in enumerate(ranked[52:]) if place in drawn]
    assert p_value(torch.bincount(torch.tensor(joined), minlength=148), torch.full((148,), 1 / 148)) > 1e-4


def test_the_fittest_are_looked_for_ever_more_often():
    fit = make_fit("evos,first_interval=10,last_interval=2", iterations=100)
    asked: list[int] = []
    sampler, residual = fit.run.sampler, fit.residual
    sampler.context = replace(
        sampler.context, residual=lambda pixels: (asked.append(fit.iteration), residual(pixels))[1]
    )
    steps(fit, 120)
    gaps = [after - before for before, after in zip(asked, asked[1:], strict=False)]
    assert asked[0] == 0 and gaps[0] == 10 and gaps[-1] == 2 and gaps == sorted(gaps, reverse=True)
    assert all(abs(gap - max(2, 10 - 8 * when / 100)) <= 1 for when, gap in zip(asked, gaps, strict=False))


@pytest.mark.parametrize(
    "sampler",
    [
        "uniform",
        "langevin,noise=0.03",
        "langevin,noise=0.03,drift=0,reinit_from=uniform,reinit_fraction=0.5",
        "multinomial,refresh=3",
        "error-map,interval=2",
        "quadtree,reduction=8,initial_depth=1",
        "greedy,interval=3",
        "evos",
    ],
)
def test_points_go_to_where_the_error_is(sampler):
    """On the left the photograph is what the field says, on the right it is not."""
    size, seen = (64, 96), make_photo(64, 96)
    values = seen.values.clone()
    values[:, :48] = predictions(make_fit(sampler, seen).field, size)[:, :48]
    fit = make_fit(sampler, Photo(values, seen.encoding), **FROZEN)
    assert residuals(fit)[:, :48].abs().max() < 1e-6
    steps(fit, 40)
    share = float((torch.cat(list(fit.drawn)[-5:])[:, 1] >= 48).float().mean())
    assert abs(share - 0.5) < 0.06 if sampler == "uniform" else share > 0.6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("setting", ["alpha=0.6", "weight_by=importance"])
def test_what_drives_the_chains_is_the_gradient_of_the_logarithm_of_the_error(channels, setting, monkeypatch):
    fit = make_fit(f"langevin,alpha_warmup=0,{setting}", make_photo(channels=channels))
    steps(fit, 60)
    field = copy.deepcopy(fit.field).double()
    updates = []
    monkeypatch.setattr(fit.run, "update", updates.append)
    fit.step()
    (batch,) = updates
    ours = langevin.grad_log_importance(batch.coords.grad, batch.weighted_error.grad, batch.weighted_error.detach())
    ours, place = ours[: batch.num_chains], batch.coords.detach()[: batch.num_chains].double()
    assert len(place) == SMALL["batch"] / 2 and not batch.coords.grad[batch.num_chains :].any()
    truth = fit.photo.at(place.long()).double()

    def log_error(position: Tensor) -> Tensor:
        with torch.no_grad():
            prediction = field.network(field.encoding(position / fit.size.double()))
        return (prediction - truth).norm(dim=-1).log()

    units, here = 1e-6 * torch.eye(2).double(), log_error(place)
    ahead = torch.stack([log_error(place + unit) - here for unit in units], dim=-1) / 1e-6
    behind = torch.stack([here - log_error(place - unit) for unit in units], dim=-1) / 1e-6
    is_smooth = (ahead - behind).norm(dim=-1) < 1e-3 * (1 + ahead.norm(dim=-1))  # not where cells of the field meet
    assert is_smooth.double().mean() > 0.4 and ahead.abs().mean() > 0.05
    torch.testing.assert_close(ours[is_smooth].double(), ahead[is_smooth], rtol=5e-3, atol=5e-3)


def test_without_chains_all_points_have_a_gradient(monkeypatch):
    """For samplers of others, which may drive something else by it."""
    fit = steps(make_fit("langevin,uniform_fraction=1"), 20)
    updates = []
    monkeypatch.setattr(fit.run, "update", updates.append)
    fit.step()
    (batch,) = updates
    assert batch.num_chains == 0 and batch.coords.grad.any(dim=1).all()


def test_the_colours_of_pixels_are_fitted_at_their_centres(monkeypatch):
    fit = make_fit("langevin")
    seen = []
    monkeypatch.setattr(fit, "loss", lambda truth, prediction: (seen.append(truth), prediction.mean())[1])
    monkeypatch.setattr(fit.run, "update", lambda batch: None)
    fit.field.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    before = fit.run.state
    fit.step()
    points, truth = seen
    pixels = points * fit.size - 0.5
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)
    assert torch.equal(truth, fit.photo.at(pixels.round().long()))
    assert len(pixels.round().unique(dim=0)) > 0.5 * len(pixels) and fit.run.state is not before


def test_chains_keep_their_places_within_pixels():
    fit = steps(make_fit("langevin,noise=1e-5,drift=0,reinit_fraction=0,uniform_fraction=0"), 1)
    before = fit.run.state.chains.position.clone()
    steps(fit, 5)
    moved = (fit.run.state.chains.position - before).abs().amax(dim=-1)
    assert (moved < 0.01).float().mean() > 0.95 and (before - before.floor() - 0.5).abs().mean() > 0.2


def test_only_chains_that_drift_ask_for_a_gradient():
    for sampler, wanted in (("langevin", True), ("langevin,drift=0", False), ("uniform", False), ("evos", False)):
        assert make_fit(sampler).run.sampler.needs_gradient == wanted


@EACH_SAMPLER
def test_a_fit_goes_on_bit_for_bit(sampler, tmp_path):
    compat.prepare_cpu()
    settings = dict(batch=400, decay_at=(9,))
    whole = steps(make_fit(sampler, **settings), 14)
    half = steps(make_fit(sampler, **settings), 7)
    save(half.state_dict(), tmp_path / "a" / "checkpoint.pt")
    torch.manual_seed(99)
    again = make_fit(sampler, **settings)
    again.load_state_dict(load(tmp_path / "a" / "checkpoint.pt"))
    assert again.iteration == 7 and fields_are_equal(again, half) and not fields_are_equal(again, whole)
    steps(again, 7)
    assert again.iteration == 14 and fields_are_equal(again, whole) and again.psnr() == whole.psnr()
    assert len(again.drawn) == 14 and all(map(torch.equal, again.drawn, whole.drawn))
    assert torch.equal(again.generator.get_state(), whole.generator.get_state())
    assert all(map(torch.equal, again.run.draw(50).pixels, whole.run.draw(50).pixels))


@EACH_SAMPLER
def test_seeds_make_a_difference_and_nothing_else_does(sampler):
    compat.prepare_cpu()
    torch.manual_seed(5)
    first = steps(make_fit(sampler, seed=1), 5)
    torch.manual_seed(6)
    same = make_fit(sampler, seed=1)
    torch.manual_seed(7)
    assert fields_are_equal(steps(same, 5), first)
    assert not fields_are_equal(steps(make_fit(sampler, seed=2), 5), first)


@pytest.mark.parametrize("sampler", ["uniform", "langevin"])
def test_a_fit_learns(sampler):
    fit = make_fit(sampler, levels=6)
    before = fit.psnr()
    assert steps(fit, 200).psnr() > before + 8


def test_psnr_is_that_of_all_pixels():
    fit = steps(make_fit("uniform", make_photo(17, 23)), 30)
    error = predictions(fit.average.module, (17, 23)).clamp(0, 1) - fit.photo.values
    assert abs(fit.psnr() + 10 * math.log10(error.square().mean())) < 1e-4


def test_predictions_out_of_range_count_as_the_ends():
    fit = make_fit("uniform", photo_of(np.full((5, 6, 1), 255, np.uint8)))
    with torch.no_grad():
        fit.average.module.network.layers[-1].bias += 7
    assert fit.psnr() > 100


def test_what_is_shown_follows_the_field_slowly():
    fit = steps(make_fit("uniform"), 100)
    size = fit.photo.size
    moved, shown = predictions(fit.field, size), predictions(fit.average.module, size)
    far = (moved - shown).abs().mean()
    for group in fit.optimizer.param_groups:
        group["lr"] = 0.0
    steps(fit, 40)
    assert torch.equal(predictions(fit.field, size), moved)
    near = (moved - predictions(fit.average.module, size)).abs().mean()
    assert 0 < near < far
    steps(fit, 700)
    torch.testing.assert_close(predictions(fit.average.module, size), moved, rtol=0, atol=2e-3)


@pytest.mark.parametrize("chunk", [64, 1 << 16])
def test_psnr_of_some_pixels_is_close_to_that_of_all_and_always_the_same(chunk, monkeypatch):
    fit = steps(make_fit("uniform", make_photo(60, 80)), 30)
    everything = fit.psnr()
    monkeypatch.setattr(fits, "CHUNK", chunk)
    assert abs(fit.psnr() - everything) < 1e-4
    assert abs(fit.psnr(1200) - everything) < 0.5 and fit.psnr(1200) == fit.psnr(1200) != everything
    assert fit.psnr(4800) == fit.psnr(10**6)


@pytest.mark.parametrize("chunk", [7, 100, 1 << 16])
def test_a_picture_of_its_own_size_is_the_prediction_at_the_pixels(chunk, monkeypatch):
    fit = steps(make_fit("uniform", make_photo(13, 30)), 20)
    expected = predictions(fit.average.module, (13, 30))
    monkeypatch.setattr(fits, "CHUNK", chunk)
    parts = list(fit.render((13, 30)))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
    pixels = (centres(13, 30) - 0.5).long()
    torch.testing.assert_close(fit.predict(centres(13, 30) / fit.size).view(expected.shape), expected)
    torch.testing.assert_close(fit.residual(pixels).view(expected.shape), residuals(fit))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (26, 80), (1, 300)])
def test_a_picture_of_any_size_shows_the_same(size, monkeypatch):
    monkeypatch.setattr(fits, "CHUNK", 128)
    fit = steps(make_fit("uniform"), 20)
    picture = torch.cat(list(render(fit.average.module, size, torch.device("cpu"))))
    assert picture.shape == (*size, 3)
    for row, column in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):
        place = torch.tensor([[(row + 0.5) / size[0], (column + 0.5) / size[1]]])
        torch.testing.assert_close(picture[row, column], fit.predict(place)[0], rtol=0, atol=1e-5)


ODD = {
    "constant": photo_of(np.full((12, 9, 3), 77, np.uint8)),
    "black": photo_of(np.zeros((12, 9, 1), np.uint8)),
    "one pixel": photo_of(np.full((1, 1, 3), 200, np.uint8)),
    "one row": make_photo(1, 50),
    "narrow": make_photo(200, 2, 4),
}


@EACH_SAMPLER
@pytest.mark.parametrize("name", ODD)
def test_any_photograph_can_be_fitted(sampler, name):
    fit = make_fit(sampler, ODD[name], batch=20)
    before = fit.psnr()
    steps(fit, 12)
    assert all(part.isfinite().all() for part in fit.field.parameters()) and fit.psnr() > min(
        before, 50
    )  # black may be met at once
    inside = torch.cat(list(fit.drawn))
    assert ((inside >= 0) & (inside < fit.size)).all() and len(inside) == 12 * 20


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("sampler", ["uniform", "error-map,interval=2", "greedy", "evos", "quadtree"])
def test_batches_may_be_tiny(sampler, batch):
    fit = steps(make_fit(sampler, batch=batch), 4)
    assert all(part.isfinite().all() for part in fit.field.parameters())
    assert all(len(positions) == batch for positions in fit.drawn)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ("nonsense", "--samplers has 'nonsense'.* langevin, .*uniform"),
        ("", "--samplers"),
        ("langevin,nonsense=1", "nonsense=1"),
        ("langevin,drift", "'drift'"),
        ("langevin,drift=abc", "drift=abc"),
        ("langevin,drift=-1.0", "--samplers langevin,drift is -1.0"),
        ("langevin,drift=float('nan')", "drift"),
        ("langevin,uniform_fraction=1.5", "--samplers langevin,uniform_fraction is 1.5"),
        ("langevin,reinit_fraction=-0.1", "--samplers langevin,reinit_fraction is -0.1"),
        ("multinomial,refresh=0", "--samplers multinomial,refresh is 0"),
        ("greedy,fraction=1.1", "--samplers greedy,fraction is 1.1"),
        ("greedy,interval=0", "--samplers greedy,interval is 0"),
        ("evos,mutated_fraction=2", "--samplers evos,mutated_fraction is 2"),
        ("evos,first_interval=0", "--samplers evos,first_interval is 0"),
        ("uniform,alpha=2", "--alpha is 2"),
        ("detail,alpha=soft", "alpha is written as in alpha=0.3"),
        ("uniform,learning_rate=0", "--learning-rate is 0"),
        ("evos,selected_fraction=0", "selected_fraction is 0"),
        ("greedy,fraction=0", "fraction is 0"),
        ("langevin,reinit_from=nowhere", "reinit_from=nowhere|reinit-from"),
        ("langevin,weight_by=nothing", "weight_by=nothing|weight-by"),
        ("uniform,implementation=none", "implementation"),
        ("langevin,levels=2.5", "levels"),
        ("uniform,batch=1e3", "batch"),
        ("uniform,decay_at=5", "decay.at"),
        ("langevin,check=1", "check"),
        ("langevin,state_class=0", "state_class"),
    ],
)
def test_a_mistake_in_the_samplers_is_named(sampler, words):
    with pytest.raises(UserError, match=words):
        make_settings(sampler, 0, 10, FitConfig(**SMALL))


def test_settings_of_one_sampler_do_not_reach_another():
    config = FitConfig(**SMALL)
    own = make_settings("langevin,batch=32,drift=2e-4,weight-by=importance", 0, 10, config)
    assert (own.config.batch, own.sampler_config.drift, own.config.weight_by) == (32, 2e-4, "importance")
    assert own.kind == "langevin"
    assert config == FitConfig(**SMALL) and make_settings("langevin", 0, 10, config).sampler_config.drift == 2e-6
    assert make_settings("uniform-weighted", 0, 10, config).config.weight_by == "importance"
    assert make_settings("uniform", 0, 10, config).config.weight_by == "density"


@pytest.mark.parametrize(
    ("sampler", "given", "alpha"),
    [
        ("detail", None, 0.3),
        ("langevin", None, 0.0),
        ("uniform-weighted", None, 0.6),
        ("detail", 0.6, 0.6),
        ("langevin", 0.2, 0.2),
        ("detail,alpha=0.9", None, 0.9),
        ("detail,alpha=1", 0.2, 1.0),
    ],
)
def test_the_softness_is_the_samplers_own_unless_one_is_given(sampler, given, alpha):
    settings = make_settings(sampler, 0, 10, FitConfig(**SMALL, alpha=given))
    assert settings.config.alpha == alpha
    assert Fit(make_photo(), settings).loss.alpha == alpha


def test_a_batch_too_small_for_its_strata_is_named():
    with pytest.raises(UserError, match="--batch is 3.* 6 or more"):
        make_fit("langevin,uniform_fraction=0.1", batch=3).step()
    make_fit("langevin,uniform_fraction=0.1", batch=6).step()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x"), lambda path: path.mkdir()])
def test_what_is_no_checkpoint_is_refused(make, tmp_path):
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt is n"):
        load(tmp_path / "checkpoint.pt")


def test_a_checkpoint_of_something_else_or_a_part_of_one_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in ([1, 2], {"field": {}}, torch.ones(3)):
        torch.save(content, path)
        with pytest.raises(UserError, match="checkpoint.pt is not"):
            load(path)
    save(make_fit().state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="checkpoint.pt is not"):
            load(path)


def test_the_field_of_a_checkpoint_is_that_of_the_fit(tmp_path):
    fit = steps(make_fit("uniform", make_photo(channels=4)), 5)
    save(fit.state_dict(), tmp_path / "checkpoint.pt")
    before = torch.get_rng_state()
    field, encoding = load_field(load(tmp_path / "checkpoint.pt"), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before) and encoding == fit.photo.encoding
    points = torch.rand(99, 2)
    assert torch.equal(field(points), fit.predict(points)) and not torch.equal(field(points), fit.field(points))


class Line:
    """Chains that leave where they are above 1, and starts that are normal around -3, all drawn anew."""

    def __init__(self, seed: int = 0) -> None:
        self.generator, self.drawn = torch.Generator().manual_seed(seed), []

    def contains(self, chains: ChainState) -> Tensor:
        return (chains.position <= 1).all(dim=-1)

    def propose(self, count: int) -> ChainState:
        self.drawn.append(count)
        place = torch.randn(count, 1, generator=self.generator)
        return langevin.start((place[:, 0] > 0).long(), place - 3, place.exp()[:, 0])


def jump(leaving: Tensor, domain: Line, reinit_fraction: float = 0.0) -> ChainState:
    """Let some of the chains at 0 leave."""
    count = len(leaving)
    start = langevin.start(torch.full((count,), 5), torch.zeros(count, 1), torch.ones(count))
    importance = torch.arange(count).float()
    return langevin.step(
        start, leaving[:, None] * 2.0, importance, domain, drift=1.0, noise=0.0, reinit_fraction=reinit_fraction
    )[0]


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_each_chain_that_leaves_follows_the_starts_however_many_leave(share):
    domain, leaving = Line(), torch.rand(400, generator=torch.Generator().manual_seed(1)) < share
    moved = [jump(leaving, domain) for _ in range(1500)]
    assert max(domain.drawn) < leaving.sum()
    assert all((chains.position[~leaving] == 0).all() and (chains.image_index[~leaving] == 5).all() for chains in moved)
    place = leaving.nonzero()[:, 0]
    for chain in (place[0], place[len(place) // 2], place[-1]):
        values = torch.stack([chains.position[chain, 0] for chains in moved]) + 3
        tenth = (torch.special.ndtr(values.double()) * 10).long()
        assert p_value(torch.bincount(tenth, minlength=10), torch.full((10,), 0.1)) > 1e-4
        for end in moved[:20]:  # a start is taken as a whole
            torch.testing.assert_close(end.density_ratio[chain], (end.position[chain, 0] + 3).exp())
            assert end.image_index[chain] == (end.position[chain, 0] + 3 > 0)


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_chains_share_a_start_only_where_more_leave_than_are_drawn(count, leave, reinit_fraction, seed):
    domain, chance = Line(seed), torch.rand(count, generator=torch.Generator().manual_seed(seed))
    leaving = chance < leave
    moved = jump(leaving, domain, reinit_fraction)
    low = torch.arange(count) < round(reinit_fraction * count)
    anew = leaving | low
    assert ((moved.position[:, 0] != 0) == anew).all() and len(domain.drawn) == 1 and domain.drawn[0] <= count
    starts = moved.position[anew, 0].unique()
    used = min(int(anew.sum()), domain.drawn[0])
    assert used - 2 <= len(starts) <= used  # a coincidence now and then
    assert domain.drawn[0] >= min(count, low.sum() + count // 16)


def propose(fit: Fit, count: int) -> PixelSamples:
    """Draw starts as a step does, and keep what is left of the reserve."""
    domain = chains._Images(fit.run.sampler, fit.run.state.reserve)
    starts = domain.propose(count)
    fit.run.state = fit.run.state._replace(reserve=domain.reserve)
    return PixelSamples(*starts)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(0, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_start_is_given_twice_and_a_resumed_sampler_gives_the_same(sizes, stop):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "RESERVE", 60)
        fit = steps(make_fit("langevin", batch=40), 1)
        given: list[Tensor] = []
        for number, size in enumerate(sizes):
            if number == stop:
                other = make_fit("langevin", batch=40)
                other.load_state_dict(copy.deepcopy(fit.state_dict()))
                fit = other
            given.append(propose(fit, size).position)
            assert len(given[-1]) == size
        plain = steps(make_fit("langevin", batch=40), 1)
        assert all(torch.equal(one, propose(plain, size).position) for one, size in zip(given, sizes, strict=True))
    everything = torch.cat(given)
    assert len(everything.unique(dim=0)) == len(everything)


def test_starts_of_a_reserve_follow_the_edges():
    fit = steps(make_fit("langevin"), 1)
    drawn = [propose(fit, count) for count in (7, 1000, 0, 9000, 20_000, 3, 12_000)]
    law = sobel(fit.photo.values).flatten().double()
    for starts in (drawn[4], concatenate(*drawn)):
        assert p_value(counts(fit, starts.position), law / law.sum()) > 1e-4
        density = (law / law.mean())[(starts.position.long() * torch.tensor((40, 1))).sum(dim=-1)]
        torch.testing.assert_close(starts.density_ratio.double(), density, rtol=0.08, atol=0)
