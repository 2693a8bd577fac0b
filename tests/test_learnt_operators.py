"""ReFT-r1, LoReFT and PSR: their losses by plain loops, their gradients, what is kept at every
step, and what the steering does of what was learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import trimtab as tt
import trimtab.training.trainer as trainer
from effects_by_hand import fresh, in_float64
from helpers import block, hand_hooked, language_model, refused_in_one_line, token_ids
from tiny import tiny_model, tiny_tokenizer
from training_by_hand import minimum
from trimtab.methods.loreft import Subspaces, orthonormal_rows
from trimtab.methods.psr import Imitation
from trimtab.methods.reft import Detecting, latents_of
from trimtab.methods.trained import TrainedMethod
from trimtab.model import asked
from trimtab.steering import Affine, Respond
from trimtab.training import Run, Text, Texts, Training, numbered, train
from trimtab.training.passes import Passes

PAIRS = [
    ("Today I feel", " happy and light.", " sad."),
    ("The answer to the question is", " yes", " not known"),
    ("I think that this film was", " wonderful.", " boring and long."),
    ("She said that the day was", " good", " bad"),
]
CONTRAST = tt.Contrast.from_pairs(PAIRS)
TEXTS = tt.Contrast.from_texts([p + a for p, a, _ in PAIRS], [p + b for p, _, b in PAIRS])
ASK = "Be glad."
METHODS: dict[str, TrainedMethod] = {
    "reft": tt.ReFT(layer=1, steps=5),
    "loreft": tt.LoReFT(layer=(0, 2), rank=3, steps=5),
    "ffn_out": tt.LoReFT(layer=1, rank=2, steps=5, site="ffn_out", positions="all"),
    "psr": tt.PSR(ask=ASK, steps=5),
    "one": tt.PSR(ask=ASK, layer=1, steps=5),
}


@pytest.fixture(scope="module")
def lm() -> tt.LanguageModel:
    return language_model("llama")


class Ready:
    """A method that is about to be trained: what the trainer would do with it, step by step."""

    def __init__(self, lm: tt.LanguageModel, method: TrainedMethod) -> None:
        self.texts: Texts = method.texts(lm, CONTRAST, None)
        self.own = method.settled(lm, self.texts)
        self.objective = self.own.objective(lm, self.texts)
        self.passes = Passes(lm, self.objective, self.texts.texts)

    def parameters(self, seed: int = 0, noise: float = 0.05) -> dict[str, Tensor]:
        """Those at the beginning, moved a little, so that none is zero."""
        generator = torch.Generator().manual_seed(seed)
        found = self.objective.start(generator)
        for tensor in found.values():
            tensor += noise * torch.randn(tensor.shape, generator=generator)
        self.objective.tidy(found)
        return found

    def figures(
        self, parameters: dict[str, Tensor], rows: Any = None, progress: float = 0.5
    ) -> dict[str, Tensor]:
        drawn = self.objective.draw(rows or self.texts.rows, torch.Generator())
        runs = [run for row in drawn for run in row]
        with self.passes.learning(runs):
            outcome = self.passes.run(parameters, runs, len(drawn), progress)
            return self.objective.loss(parameters, outcome)


def answer_of(pair: tuple[str, str, str], side: int, before: str = "") -> tuple[list[int], int]:
    """Token ids of a text, and where both sides' answers begin."""
    prompt = before + pair[0]
    start = min(_common(token_ids(prompt), token_ids(prompt + answer)) for answer in pair[1:])
    return token_ids(prompt + pair[1 + side]), start


def _common(one: list[int], other: list[int]) -> int:
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    return differ[0] if differ else min(len(one), len(other))


def nll(logits: Tensor, ids: list[int], start: int) -> Tensor:
    log_p = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return -log_p[start - 1 :].mean()


# -- losses by plain loops ------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "all[1:]", "last"])
def test_latents_penalty_and_loss_of_reft_by_a_loop(lm: tt.LanguageModel, positions: str) -> None:
    ready = Ready(lm, tt.ReFT(layer=1, top=4, penalty=0.3, positions=positions))
    w = ready.parameters()["layers.1.resid"]
    found = ready.figures({"layers.1.resid": w.clone().requires_grad_(True)}, progress=0.25)
    for row, pair in enumerate(PAIRS):
        losses, others = [], []
        for side in (0, 1):
            ids, start = answer_of(pair, side)
            first = start - 1 if positions == "last" else 0 if positions == "all" else 1
            noted = []

            def change(x: Tensor, first: int = first, noted: list[Tensor] = noted) -> Tensor:
                z = (x[0] @ w).relu()[max(first, 1) :]
                k = min(4, len(z))
                top = z.sort(descending=True).values[:k]
                noted.append((z.sum() - top.sum()) / len(z))
                shift = torch.zeros_like(x)
                shift[:, first:] = top.mean() * w
                return x + shift

            with torch.no_grad(), hand_hooked(block(lm.model, 1), change):
                logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
            losses.append(nll(logits, ids, start))
            others.append(noted[0])
        torch.testing.assert_close(found["nll"][row], sum(losses) / 2)
        torch.testing.assert_close(found["other_latents"][row], sum(others) / 2)
        expected = sum(losses) / 2 + 0.3 * 0.25 * sum(others) / 2
        torch.testing.assert_close(found["loss"][row], expected)


def test_loss_of_loreft_by_a_loop(lm: tt.LanguageModel) -> None:
    """Exactly the tokens of the scope: the first five of the prompt, and its last five."""
    ready = Ready(lm, tt.LoReFT(layer=1, rank=3))
    parameters = ready.parameters()
    found = ready.figures(parameters)["loss"]
    r, w, b = (parameters[f"layers.1.resid/{name}"] for name in ("R", "W", "b"))
    for row, pair in enumerate(PAIRS):
        ids, start = answer_of(pair, 0)
        ends = {*range(min(5, start)), *range(max(0, start - 5), start)}

        def change(x: Tensor, ends: set[int] = ends) -> Tensor:
            new = x.clone()
            for t in ends:
                new[0, t] = x[0, t] + r.T @ (w @ x[0, t] + b - r @ x[0, t])
            return new

        with torch.no_grad(), hand_hooked(block(lm.model, 1), change):
            logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(found[row], nll(logits, ids, start))


@pytest.mark.parametrize("layer", [None, 1])
def test_loss_of_psr_by_a_loop(lm: tt.LanguageModel, layer: int | None) -> None:
    ready = Ready(lm, tt.PSR(ask=ASK, layer=layer))
    parameters = ready.parameters()
    found = ready.figures(parameters)["loss"]
    steered = range(3) if layer is None else [layer]

    def run(pair: tuple[str, str, str], before: str, change: bool) -> list[Tensor]:
        """The activations after each block, from the token before the answer on."""
        ids, start = answer_of(pair, 0, before)
        seen, handles = [], []

        def hook(number: int) -> Any:
            def edit(module: Any, args: Any, x: Tensor) -> Tensor:
                if change and number in steered:
                    site = f"layers.{number}.resid"
                    a, b, v = (parameters[f"{site}/{name}"] for name in ("a", "b", "v"))
                    x = x.clone()
                    for t in range(start - 1, len(ids)):
                        x[0, t] += torch.clamp(a @ x[0, t] + b, min=0) * v
                seen.append(x[0, start - 1 :])
                return x

            return edit

        for number in range(3):
            handles.append(block(lm.model, number).register_forward_hook(hook(number)))
        with torch.no_grad():
            lm.model(torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        return seen[min(steered) :]

    def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
        return sum(float((x - y).pow(2).mean()) for x, y in zip(ours, theirs, strict=True))

    targets = [run(pair, ASK + "\n\n", False) for pair in PAIRS]
    whole = [distance(run(p, "", False), t) for p, t in zip(PAIRS, targets, strict=True)]
    for row, (pair, target) in enumerate(zip(PAIRS, targets, strict=True)):
        expected = distance(run(pair, "", True), target) / (sum(whole) / len(whole))
        assert float(found[row]) == pytest.approx(expected, rel=1e-4)
    begun = ready.figures(ready.objective.start(torch.Generator()))["loss"]
    assert float(begun.mean()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["reft", "loreft", "ffn_out", "psr"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    ready = Ready(fresh("llama"), METHODS[name])
    begun = ready.parameters(noise=0.1)
    own = {key: tensor.double().requires_grad_(True) for key, tensor in begun.items()}
    rows = ready.texts.rows[:2]
    with in_float64():
        ready.figures(own, rows)["loss"].mean().backward()
    generator, step = torch.Generator().manual_seed(3), 1e-5
    for key, tensor in own.items():
        way = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            moved = {**own, key: (tensor + sign * step * way).detach()}
            with in_float64():
                losses.append(float(ready.figures(moved, rows)["loss"].mean().detach()))
        assert tensor.grad is not None
        told = float((tensor.grad * way).sum())
        assert told == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-8)


# -- what is kept at every step -------------------------------------------------------------------


def test_rows_are_orthonormal_after_every_step(
    lm: tt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    tidy = Subspaces.tidy

    def watch(self: Subspaces, parameters: Any) -> None:
        tidy(self, parameters)
        seen.extend(r.detach().clone() for name, r in parameters.items() if name.endswith("/R"))

    monkeypatch.setattr(Subspaces, "tidy", watch)
    tt.LoReFT(layer=1, rank=3, steps=5, learning_rate=0.5).fit(lm, CONTRAST, measure=False)
    assert len(seen) == 5
    for r in seen:
        torch.testing.assert_close(r @ r.T, torch.eye(3), atol=2e-6, rtol=0)
    assert (seen[0] - seen[-1]).abs().max() > 0.1


def test_an_orthonormal_basis_stays_as_it_is() -> None:
    rows = orthonormal_rows(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).double())
    torch.testing.assert_close(orthonormal_rows(rows), rows)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())


def test_the_detector_has_length_1_and_is_kept(lm: tt.LanguageModel) -> None:
    site = "layers.1.resid"
    steering = tt.ReFT(layer=1, steps=5, learning_rate=0.2).fit(lm, CONTRAST, measure=False)
    reader, told = steering.tables[f"reader.{site}"], steering.findings["latents"][site]
    assert float(reader.norm()) == pytest.approx(1, abs=1e-6)
    vector = steering.interventions[0].operator.added
    torch.testing.assert_close(vector, told["largest"] * reader)
    torch.testing.assert_close(steering.tables[f"writer.{site}"], vector)
    # The largest latent of the positive texts, but for their first token.
    seen: list[Tensor] = []
    for pair in PAIRS:
        for side in (0, 1):
            with torch.no_grad(), hand_hooked(block(lm.model, 1), lambda x: seen.append(x[0]) or x):
                lm.model(torch.tensor([answer_of(pair, side)[0]]), use_cache=False)
    latents = [(x @ reader).relu()[1:] for x in seen]
    assert told["largest"] == pytest.approx(float(torch.cat(latents[::2]).max()), rel=1e-5)
    tops = [float(z.sort(descending=True).values[:8].mean()) for z in latents]
    assert told["positive"] == pytest.approx(sum(tops[::2]) / 4, rel=1e-5)
    assert told["negative"] == pytest.approx(sum(tops[1::2]) / 4, rel=1e-5)
    more = sum(p > n for p in tops[::2] for n in tops[1::2])
    assert told["auroc"] == pytest.approx(more / 16)


# -- what the steering does of it ------------------------------------------------------------------


def test_loreft_sets_what_its_subspace_says() -> None:
    generator = torch.Generator().manual_seed(0)
    r = orthonormal_rows(torch.randn(2, 8, generator=generator).double())
    w, b = torch.randn(2, 8, generator=generator).double(), torch.randn(2, generator=generator)
    x = torch.randn(5, 8, generator=generator).double()
    own = {"s/R": r.float(), "s/W": w.float(), "s/b": b}
    method = tt.LoReFT(positions="all")
    (made,) = method.interventions(own)
    assert isinstance(made.operator, Affine)
    steered = made.operator.bind(1.0)(x)
    torch.testing.assert_close(steered @ r.T, x @ w.T + b.double(), atol=1e-6, rtol=1e-5)
    across = torch.eye(8).double() - r.T @ r
    torch.testing.assert_close(steered @ across, x @ across, atol=1e-6, rtol=1e-5)
    matrix = torch.eye(8).double() + r.T @ (w - r)
    (bare,) = method.interventions({"s/R": r.float(), "s/W": w.float()})
    torch.testing.assert_close(bare.operator.bind(1.0)(x), x @ matrix.T, atol=1e-6, rtol=1e-5)
    (nothing,) = method.interventions({"s/R": r.float(), "s/W": r.float(), "s/b": 0 * b})
    assert torch.equal(nothing.operator.bind(1.0)(x), x)


@pytest.mark.parametrize("name", ["loreft", "ffn_out", "psr", "one"])
def test_the_steering_is_what_was_trained(lm: tt.LanguageModel, name: str) -> None:
    """The loss at the end is that of the steering at dial 1: the same tokens, the same change."""
    ready = Ready(lm, METHODS[name])
    parameters = ready.parameters()
    steering = tt.Steering(
        method=name,
        hyperparameters={},
        interventions=tuple(ready.own.interventions(parameters)),
        dial=tt.Dial("alpha", 1.0, (0.0, 1.0)),
        model=lm.identity,
    )
    drawn = [[Run(number) for number in row[:1]] for row in ready.texts.rows]
    with torch.no_grad():
        outcome = ready.passes.run(parameters, [run for row in drawn for run in row], len(drawn))
    plain = tt.Steering(**{**vars(steering), "interventions": ()})
    for row, pair in enumerate(PAIRS):
        (text,) = tt.Contrast.from_pairs([pair]).pairs
        both = [tt.log_odds(lm, tt.Contrast((text,)), each) for each in (steering, plain)]
        ids, start = answer_of(pair, 0)
        with torch.no_grad(), lm.steered(steering) as sequences:
            sequences.given_ends = [start]
            logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
        found = -nll(logits, ids, start) * (len(ids) - start)
        assert float(outcome.log_p[row]) == pytest.approx(float(found), rel=1e-4)
        assert abs(float(both[0] - both[1])) > 1e-4


def test_what_bakes_and_what_an_adapter_holds(lm: tt.LanguageModel, tmp_path: Path) -> None:
    """Without b the map is one of weights alone, in training too."""
    method = tt.LoReFT(layer=1, site="ffn_out", positions="all", steps=5, bias=False, rank=2)
    steering = method.fit(lm, CONTRAST, measure=False)
    prompts = ["Today I feel", "The captain stood at"]
    attached = lm.logits(prompts, steering=steering)
    torch.testing.assert_close(tt.bake(lm, steering).logits(prompts), attached, atol=1e-4, rtol=0)
    exported = tt.export(lm, steering, "lora", tmp_path / "lora")
    assert exported.exact
    with_b = METHODS["ffn_out"].fit(lm, CONTRAST, measure=False)
    says = "adds a constant, and an adapter has none; bake it"
    refused_in_one_line(lambda: tt.export(lm, with_b, "lora", tmp_path / "other"), says)
    ends = METHODS["loreft"].fit(lm, CONTRAST, measure=False)
    refused_in_one_line(lambda: tt.bake(lm, ends), r"acts on the scope 'prompt\[:5\] \| prompt")
    gated = METHODS["psr"].fit(lm, CONTRAST, measure=False).scoped("all")
    refused_in_one_line(lambda: tt.bake(lm, gated), "Respond, .* is not linear .*; attach it")


@pytest.mark.parametrize("name", METHODS)
def test_training_brings_the_loss_down(lm: tt.LanguageModel, name: str) -> None:
    rates = {"reft": 0.02, "loreft": 0.02, "ffn_out": 0.02, "psr": 0.003, "one": 0.003}
    method = type(METHODS[name])(
        **{**vars(METHODS[name]), "steps": 25, "batch": 4, "learning_rate": rates[name]}
    )
    loss = method.fit(lm, CONTRAST, measure=False).findings["training"]["loss"]
    assert loss["last"] < 0.995 * loss["first"], loss


def test_a_planted_vector_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the activations to be matched are those under a vector that is added, PSR finds it."""
    lm = language_model("llama")
    planted = torch.randn(lm.anatomy.hidden_size, generator=torch.Generator().manual_seed(4))
    planted = 0.5 * planted / planted.norm()
    read = Imitation._read

    def target(self: Imitation, number: int) -> list[Tensor]:
        own = next(text for text, other in self._texts.rows if other == number)
        edit = Respond(planted, torch.zeros_like(planted), 1.0)
        dial = tt.Dial("alpha", 1.0, (0.0, 1.0))
        there = (tt.Intervention("layers.1.resid", edit),)
        steering = tt.Steering("x", {}, there, dial, self._lm.identity)
        with self._lm.steered(steering):
            return read(self, own)

    monkeypatch.setattr(Imitation, "_target", target)
    method = tt.PSR(ask=ASK, layer=1, steps=40, batch=4, learning_rate=0.02)
    steering = method.fit(lm, CONTRAST, measure=False)
    found = steering.interventions[0].operator
    assert isinstance(found, Respond)
    assert torch.cosine_similarity(found.vector, planted, dim=0) > 0.9
    assert steering.findings["training"]["loss"]["last"] < 0.9


# -- going on after an interruption ----------------------------------------------------------------


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", ["reft", "loreft", "psr"])
def test_an_interrupted_training_ends_in_the_same_bits(
    lm: tt.LanguageModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    whole = method.fit(lm, CONTRAST, measure=False)
    monkeypatch.setattr(trainer, "_KEPT_EVERY", 0.0)
    step, taken = trainer._Trainer._step, []

    def stop(self: Any) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise StoppedError
        step(self)

    monkeypatch.setattr(trainer._Trainer, "_step", stop)
    with pytest.raises(StoppedError):
        method.fit(lm, CONTRAST, measure=False, cache=tmp_path)
    again = method.fit(lm, CONTRAST, measure=False, cache=tmp_path)
    assert len(taken) == 6  # three, the one that was stopped, and two
    assert again.digest == whole.digest
    assert again.findings["training"]["loss"] == whole.findings["training"]["loss"]


# -- texts, words, refusals ------------------------------------------------------------------------


def test_what_a_contrast_says_of_itself_is_asked_for() -> None:
    lm = language_model("llama")
    said = replace(CONTRAST, behaviour="be glad")
    own, given = (
        tt.PSR(ask=ask, layer=1, steps=2).fit(lm, said) for ask in (None, "Please be glad.")
    )
    for mine, other in zip(own.interventions, given.interventions, strict=True):
        assert torch.equal(mine.operator.vector, other.operator.vector)
    silent = replace(CONTRAST, behaviour="")
    refused_in_one_line(lambda: tt.PSR(layer=1).fit(lm, silent), "does not say what its positive")


def test_what_is_asked_for_goes_before_the_prompt() -> None:
    lm = language_model("llama")
    chat = (("user", "How are you?"),)
    assert asked(lm, ["Today"], ASK)[0] == "Be glad.\n\nToday"
    assert asked(lm, ["<s>Today"], ASK)[0] == "<s>Be glad.\n\nToday"
    assert asked(lm, [chat], ASK)[0] == (("system", ASK), *chat)
    own = (("system", "You are old."), *chat)
    assert asked(lm, [own], ASK)[0] == (("system", "You are old.\n\nBe glad."), *chat)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system message') }}{% endif %}"
        "{{ message['content'] }}\n{% endfor %}"
    )
    without = tt.wrap(tiny_model("llama"), tokenizer, "none")
    assert asked(without, [chat], ASK)[0] == (("user", "Be glad.\n\nHow are you?"),)


def test_psr_of_conversations(lm: tt.LanguageModel) -> None:
    rows = [([{"role": "user", "content": p}], a, b) for p, a, b in PAIRS]
    steering = tt.PSR(ask=ASK, layer=1, steps=2).fit(lm, tt.Contrast.from_pairs(rows))
    assert steering.findings["training"]["loss"]["first"] == pytest.approx(1, abs=0.5)
    assert ASK in " ".join(tt.PSR.explain(steering))


def test_reft_of_texts_without_partners(lm: tt.LanguageModel) -> None:
    steering = tt.ReFT(layer=1, steps=3, batch=3).fit(lm, TEXTS, measure=False)
    assert steering.findings["training"]["rows"] == 8
    latents = latents_of(lm, [], {"layers.1.resid": torch.ones(48)}, "all")
    assert latents == {"layers.1.resid": []}
    assert "AUROC" in " ".join(tt.ReFT.explain(steering))


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_step_of_a_preset_has_as_many_texts_with_partners_and_without(
    preset: Literal["small", "paper"], lm: tt.LanguageModel
) -> None:
    method = tt.ReFT(preset=preset)
    paired, single = (
        method.settled(lm, method.texts(lm, some, None)) for some in (CONTRAST, TEXTS)
    )
    assert (paired.batch, single.batch) == (3, 6)
    assert paired.steps == single.steps
    assert tt.ReFT(preset=preset, batch=4).settled(lm, method.texts(lm, TEXTS, None)).batch == 4


def test_settings_that_do_not_fit(lm: tt.LanguageModel) -> None:
    for says, method, contrast in (
        ("are tokens of prompts, .* unpaired.*give it pairs, or", tt.LoReFT(), TEXTS),
        ("rank 100 is more than the 48 of layers.0.resid", tt.LoReFT(rank=100), CONTRAST),
        ("unpaired, so that there are no prompts", tt.PSR(ask=ASK), TEXTS),
        ("the model takes 256: ask in fewer words", tt.PSR(ask=ASK * 200), CONTRAST),
    ):
        refused_in_one_line(lambda m=method, c=contrast: m.fit(lm, c), says)  # type: ignore[misc]
    refused_in_one_line(lambda: tt.PSR(ask=" "), "psr: ask is empty: say what to ask for")
    refused_in_one_line(lambda: tt.ReFT(top=0), "top must be 1 or more, not 0")
    refused_in_one_line(lambda: tt.ReFT(penalty=-1.0), "penalty must be 0 or more, not -1")
    trained = tt.LoReFT(positions="all", layer=1, steps=2).fit(lm, TEXTS, measure=False)
    assert trained.findings["training"]["rows"] == 4


# -- what is planted is found ---------------------------------------------------------------------


def _head(lm: tt.LanguageModel) -> Tensor:
    return lm.model.get_output_embeddings().weight.detach().double()


@torch.no_grad()
def _normed(lm: tt.LanguageModel, ids: list[list[int]]) -> Tensor:
    """What the LM head reads, [texts, tokens, units] in float64."""
    return lm.model.model(torch.tensor(ids)).last_hidden_state.double()


@pytest.mark.slow
def test_reft_finds_the_direction_that_wrote_the_texts(lm: tt.LanguageModel) -> None:
    """Answers are drawn as the model gives them when its own latents along a direction steer it.
    The training ends where L-BFGS ends from the loss as it is written, and does there no worse than
    the planted direction."""
    generator = torch.Generator().manual_seed(0)
    width, top = lm.anatomy.hidden_size, 2
    planted = torch.randn(width, generator=generator, dtype=torch.float64)
    planted /= planted.norm()
    prompt = [1, 20, 30, 40]
    before = _normed(lm, [prompt])[0]
    planted *= (before[-1] @ planted).sign()  # so that it fires at the prompt
    size = float((before[1:] @ planted).relu().topk(top).values.mean())
    odds = ((before[-1] + size * planted) @ _head(lm).T).softmax(-1)
    tokens = torch.multinomial(odds, 600, replacement=True, generator=generator)
    texts = numbered([(Text((*prompt, token), 4),) for token in tokens.tolist()])
    h = _normed(lm, [[*prompt, token] for token in tokens.tolist()])

    def loss(w: Tensor) -> Tensor:
        w = w / w.norm()
        sizes = (h[:, 1:] @ w).relu().topk(top, -1).values.mean(-1, keepdim=True)
        log_p = ((h[:, 3] + sizes * w) @ _head(lm).T).log_softmax(-1)
        return -log_p[torch.arange(len(tokens)), tokens].mean()

    own = Detecting(top, 0.0, widths={"final_norm": width}, positions="all")
    settings = Training(steps=150, batch=len(tokens), learning_rate=0.02)
    found = train(lm, own, texts, settings).parameters["final_norm"].double()
    best = minimum(loss, found)
    assert float(loss(found)) == pytest.approx(float(loss(best)), abs=2e-3)
    assert float(loss(found)) <= float(loss(planted)) + 2e-3
    assert torch.cosine_similarity(found, best, dim=0) > 0.95


@pytest.mark.slow
def test_loreft_reaches_the_map_that_wrote_the_texts(lm: tt.LanguageModel) -> None:
    """Answers are drawn as the model gives them under a map of rank one; the subspace is found, and
    the likelihood is that of the planted map or more."""
    generator = torch.Generator().manual_seed(1)
    width = lm.anatomy.hidden_size
    r = torch.randn(width, generator=generator, dtype=torch.float64)
    r /= r.norm()
    w, b = 0.3 * torch.randn(width, generator=generator, dtype=torch.float64), 3.0
    prompts = [[1, token, 30] for token in range(40, 60)]
    before = _normed(lm, prompts)[:, -1]

    def log_p(r: Tensor, w: Tensor, b: Tensor | float) -> Tensor:
        """[prompts, vocabulary]"""
        changed = before + (before @ w + b - before @ r)[:, None] * r
        return (changed @ _head(lm).T).log_softmax(-1)

    tokens = torch.multinomial(log_p(r, w, b).exp(), 60, replacement=True, generator=generator)
    texts = numbered(
        [(Text((*p, t), 3),) for p, row in zip(prompts, tokens.tolist(), strict=True) for t in row]
    )
    own = Subspaces(1, True, widths={"final_norm": width}, positions="all")
    settings = Training(steps=200, batch=len(texts.rows), learning_rate=0.05)
    made = {name: x.double() for name, x in train(lm, own, texts, settings).parameters.items()}
    found = (made["final_norm/R"][0], made["final_norm/W"][0], made["final_norm/b"][0])

    def nll(log_p: Tensor) -> float:
        return float(-log_p.gather(1, tokens).mean())

    assert nll(log_p(*found)) <= nll(log_p(r, w, b)) + 2e-3
    assert nll(log_p(*found)) < nll((before @ _head(lm).T).log_softmax(-1)) - 0.05
    assert abs(float(found[0] @ r)) > 0.9
