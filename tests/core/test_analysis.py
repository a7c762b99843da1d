"""What is measured of LoRAs and of pictures: angles, maps, groups, intervals."""

import pytest
import torch

from hywu_core import GeneratorConfig, InstanceLora
from hywu_core.analysis.geometry import centred, cosines, gram, plane, separation
from hywu_core.analysis.statistics import bootstrap, psnr
from hywu_core.lora import cosine
from hywu_core.training import SharedLora
from hywu_core.training.trainable import diversity_loss

CONFIG = GeneratorConfig.from_dict(
    {
        "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
        "num_base_model_layers": 2, "alpha": 4, "dim_accumulation": 2,
        "pg_mapping": {"b": {"lora_A_dim": 6, "lora_B_dim": 10}, "a": {"lora_A_dim": 12, "lora_B_dim": 4}},
    }
)  # fmt: skip


def random_batch(batch, seed=0):
    shared = [SharedLora(CONFIG, 2, 4.0, seed + i) for i in range(batch)]
    for index, one in enumerate(shared):
        source = torch.Generator().manual_seed(100 + seed + index)
        for up in one.ups:
            up.data.copy_(torch.randn(up.shape, generator=source))
    loras = [one.lora() for one in shared]
    factors = {
        name: tuple(torch.cat(parts).detach() for parts in zip(*(lora.factors[name] for lora in loras), strict=True))
        for name in loras[0].names
    }
    return InstanceLora(factors, loras[0].scale)


def test_cosines_and_their_map_are_those_of_the_products():
    lora = random_batch(4)
    dense = torch.stack([torch.cat([(p.up[i] @ p.down[i]).flatten() for p in lora.pairs]) for i in range(4)])
    torch.testing.assert_close(gram(lora), dense @ dense.T, rtol=1e-4, atol=1e-3)
    assert float(cosines(gram(lora))[0, 1]) == pytest.approx(float(cosine(lora.select(0), lora.select(1))), abs=1e-5)
    middle = dense - dense.mean(0)
    torch.testing.assert_close(centred(gram(lora)), middle @ middle.T, rtol=1e-3, atol=1e-2)
    _, values, _ = torch.linalg.svd(middle, full_matrices=False)
    assert plane(gram(lora)).norm(dim=0).tolist() == pytest.approx(values[:2].tolist(), rel=1e-3)


def test_diversity_punishes_one_lora_for_all():
    apart = random_batch(3)
    same = apart.map(lambda pair: type(pair)(*(t[:1].expand(3, *t.shape[1:]) for t in pair)))
    assert float(diversity_loss(same)) == pytest.approx(1.0, abs=1e-5)
    assert float(diversity_loss(apart)) < 0.2


def test_separation_sees_groups():
    similar = torch.tensor([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.0, 0.1], [0.1, 0.0, 1.0, 0.8], [0.2, 0.1, 0.8, 1.0]])
    found = separation(similar, [0, 0, 1, 1])
    assert found.purity == 1 and found.within == pytest.approx(0.85) and found.across == pytest.approx(0.1)
    assert separation(similar, [0, 1, 0, 1]).purity == 0


def test_intervals_shrink_with_items_and_grow_with_seeds_that_disagree():
    source = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=source) + 1
    one = bootstrap(values)
    assert one.low < float(values.mean()) < one.high
    assert one.high - one.low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.25)
    disagree = bootstrap(torch.stack([values, values + 2, values - 2]))
    assert disagree.high - disagree.low > 2 * (one.high - one.low)
    assert one.excludes_zero and not bootstrap(values - 1).excludes_zero


def test_psnr():
    black = torch.zeros(2, 3, 4, 4)
    assert psnr(black, black + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-5)
    assert psnr(black, black).tolist() == [100.0, 100.0]
