"""Why nothing is chosen, in sentences, and what to try."""

from __future__ import annotations

from trimtab.contrasts import Contrast
from trimtab.options import Making
from trimtab.wishes.asking import Asked
from trimtab.wishes.choosing import Choice, Tried
from trimtab.wishes.made import Made

#: Fewer validation pairs show only what is large.
_FEW = 16
#: Chance drops half of the pairs that are judged by their instructions.
_DISOBEYED = 0.25


def nothing_gains(choice: Choice, contrast: Contrast, prompt: Asked | None) -> list[str]:
    """Why nothing is chosen, or nothing."""
    best = choice.best
    if best is not None and best.gain.low > 0:
        return []
    if best is None:
        reasons = "; ".join(f"{row.name}: {row.why}" for row in choice.rows if row.why)
        return [f"no method could be fitted and turned within the limit of cost ({reasons})"]
    tried = sorted((row.best for row in choice.rows if row.best), key=lambda one: -one.gain.value)
    by_method: dict[str, Tried] = {}
    for one in tried:
        by_method.setdefault(one.arm.partition(" ")[0], one)
    said = "; ".join(f"{name} {one.gain}" for name, one in by_method.items())
    why = [
        f"no method gains clearly on the {best.gain.n} validation pairs within the limit of cost "
        f"(gain in nats with its 95 % interval: {said})"
    ]
    why += of_contrast(contrast)
    if prompt is not None and prompt.gain.low <= 0:
        why.append(
            f"the model does not do it even when it is asked ({prompt.said}): {prompt.gain} nats"
        )
    return why


def of_asking(found: Made) -> list[str]:
    """What the best prompt does on the test pairs, where it was measured on them."""
    if found.baseline is None or found.baseline.tested is None:
        return []
    gain = found.baseline.tested.gain
    low, high = gain.ci95
    return [
        f"asking ({found.baseline.asked.said}) gains {gain.difference:+.3g} nats "
        f"[{low:.3g}, {high:.3g}] on them"
    ]


def of_contrast(contrast: Contrast) -> list[str]:
    """That the contrast is small, and that the model did not do what it was told when it wrote."""
    said = []
    pairs = contrast.sizes["validation"]
    if pairs < _FEW:
        said.append(f"{pairs} validation pairs are few: only large gains show")
    counts = (contrast.made or {}).get("counts") or {}
    written, exchanged = counts.get("written", 0), counts.get("dropped", {}).get("exchanged", 0)
    if exchanged > _DISOBEYED * written:
        said.append(
            f"{exchanged} of {written} pairs that the model wrote fit each other's instruction "
            "better and were dropped: it hardly does this when it is told"
        )
    return said


def advice_for(found: Made, making: Making) -> list[str]:
    """What to try where nothing works."""
    said = []
    if found.contrast is None:
        said.append("say the opposite in words of your own (--opposite)")
        said.append("write more or longer texts (--questions, --max-new-tokens)")
        return [*said, "take a larger model, or a stronger writer and judge (--writer, --judge)"]
    asked = found.baseline
    if asked is not None:
        low = asked.asked.gain.low if asked.tested is None else asked.tested.gain.ci95[0]
        heeds = f"ask for it: {asked.asked.said}"
        said.append(heeds if low > 0 else "take a model that does it when it is asked")
    said.append(f"allow more cost than {making.max_cost:g} nats per token (--max-cost)")
    if not making.train:
        said.append("try trained methods too (--train)")
    said.append("look at the pairs, mend or add some, and make it of them (--contrast)")
    return said
