"""One short run of every method on every family; the oracle is in ``cells``."""

from __future__ import annotations

import families
import pytest
from cells import check
from examples import EXAMPLES
from tiny import tiny

from lorascope.inputs import models
from lorascope.methods import FourierFT, HydraLoRA, LoRA, NeFT


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that gives model and task of a family, and creates them on first use."""
    made: dict[str, tuple] = {}

    def of(family: str) -> tuple:
        if family not in made:
            task = families.task_of(family)
            path = families.folder(tmp_path_factory.mktemp("families") / family, family)
            made[family] = models.load(path, task=task), task
        return made[family]

    return of


def cells():
    """Yield all pairs of family and method; one family per method is not marked slow."""
    for place, family in enumerate(families.FAMILIES):
        for number, method in enumerate(EXAMPLES):
            fast = number % len(families.FAMILIES) == place
            yield pytest.param(family, method, marks=() if fast else pytest.mark.slow, id=f"{family}-{method}")


@pytest.mark.parametrize(("family", "method"), list(cells()))
def test_method_on_family(family, method, bases, tmp_path):
    check(family, EXAMPLES[method], *bases(family), tmp_path / "run", batch_size=6, eval_size=12, test_size=8)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("vit", LoRA(targets="embed"), "'vit.embeddings.*' must be nn.Linear.* got torch.nn.*Conv2d"),
        ("t5", FourierFT(targets="embed"), "embedding 'shared'.* FourierFT"),
        (
            "bart",
            HydraLoRA(targets="embed"),
            "embedding 'model.shared'.* router",
        ),
        ("llama", NeFT(select_by="probed"), "select_by='probed'.* classes"),
        ("t5", NeFT(select_by="probed"), "select_by='probed'.* classes"),
        ("llama", LoRA(targets="cross_q"), "'cross_q' matches no module"),
    ],
)
def test_method_that_a_family_does_not_support_raises_one_line(family, method, message):
    model = tiny(family)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        next(method.phases({})).method.attach(model)
    assert "\n" not in str(caught.value)
