"""A HunyuanImage-3 that another node pack built: the same weights, banks beside the router whose own forward is never called,
no head for text. Conditions are read from it, and LoRAs act in its own forward.
"""

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from hunyuan_tiny import FIXTURES, golden_edit, make_folder, relative
from torch import nn

from hywu_core import load_generator
from hywu_core.bases.hunyuan_image3 import loader
from hywu_core.bases.hunyuan_image3.text_mode import read_edit
from hywu_core.condition import HIDDEN_STATES, Condition
from hywu_core.errors import ConditionError, MatchError
from hywu_core.host import memory
from hywu_core.host.lora.apply import applied_loras, apply_lora, beside

pytestmark = pytest.mark.usefixtures("inference")


class Bank(nn.Module):
    """What the host's MoEExperts is to its users."""

    def __init__(self, bank):
        super().__init__()
        self.weight, self.weight_function = bank.weight, []
        self.num_experts, self.in_features, self.out_features = bank.num_experts, bank.in_features, bank.out_features

    def bank_resident(self, _x):
        import contextlib

        return contextlib.nullcontext(self)

    def expert_linear(self, x, index):
        return F.linear(x, self.weight[index])


class Mixture(nn.Module):
    """Their mixture: it asks its banks expert by expert."""

    def __init__(self, mlp):
        super().__init__()
        self.gate, self.shared_mlp, self.top_k = nn.Module(), mlp.shared_mlp, mlp.gate.top_k
        self.gate.wg = mlp.gate.wg
        self.experts_gate_up_proj = Bank(mlp.experts.gate_and_up_proj)
        self.experts_down_proj = Bank(mlp.experts.down_proj)

    def forward(self, x):
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        shares, chosen = self.gate.wg(flat).float().softmax(-1).topk(self.top_k, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        for expert in range(self.experts_down_proj.num_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            first, second = self.experts_gate_up_proj.expert_linear(flat[token], expert).chunk(2, dim=-1)
            rows = self.experts_down_proj.expert_linear(first * F.silu(second), expert)
            out.index_add_(0, token, rows * shares[token, slot, None])
        return self.shared_mlp(x) + out.view_as(x)


class TheirBase(nn.Module):
    """Their BaseModel, as far as a patcher and a LoRA look at it."""

    def __init__(self, ours):
        super().__init__()
        self.diffusion_model = nn.Module()
        theirs = self.diffusion_model
        theirs.config, theirs.dtype, theirs.model = ours.config, torch.float32, nn.Module()
        theirs.model.wte = ours.model.wte
        theirs.model.layers = nn.ModuleList()
        for layer in ours.model.layers:
            copy = nn.Module()
            copy.self_attn, copy.mlp = layer.self_attn, Mixture(layer.mlp)
            copy.input_layernorm, copy.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
            theirs.model.layers.append(copy)
        for name in ("patch_embed", "final_layer", "time_embed", "time_embed_2", "timestep_emb"):
            setattr(theirs, name, getattr(ours, name))

    def get_dtype_inference(self):
        return torch.float32


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    with torch.inference_mode():
        folder = make_folder(tmp_path_factory.mktemp("foreign") / "base")
        ours, _, encoder = loader.load(folder, torch.float32)
        theirs = comfy.model_patcher.CoreModelPatcher(
            TheirBase(ours.model.diffusion_model),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        edit = golden_edit(encoder)
        lora = load_generator(FIXTURES / "pg_tiny").generate(read_edit(ours, edit).condition.parts[0].tokens)
        yield ours, theirs, edit, lora


def test_its_condition_is_ours(setting):
    ours, theirs, edit, _ = setting
    found = read_edit(theirs, edit)
    assert torch.equal(found.condition.parts[0].tokens, read_edit(ours, edit).condition.parts[0].tokens)
    assert found.condition.parts[0].kind == HIDDEN_STATES and isinstance(found.condition, Condition)
    assert found.ratio_logits is None and found.size == edit.default_size  # it has no head for text


def test_a_lora_acts_in_its_own_forward_and_leaves_no_trace(setting):
    ours, theirs, _, lora = setting
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    their_mlp, our_mlp = (model.model.diffusion_model.model.layers[1].mlp for model in (theirs, ours))
    before = their_mlp(x)
    assert relative(before, our_mlp(x)) < 5e-6
    on_theirs, report = apply_lora(theirs, lora, 1.0)
    on_ours, _ = apply_lora(ours, lora, 1.0)
    assert str(report) == f"matched {report.total}/{report.total} targets"
    outputs = []
    for model, mlp in ((on_theirs, their_mlp), (on_ours, our_mlp)):
        with beside(model.model.diffusion_model, applied_loras(model)):
            outputs.append(mlp(x))
    assert relative(*outputs) < 5e-6
    assert relative(outputs[0], before) > 0.05
    assert torch.equal(their_mlp(x), before) and "forward" not in vars(their_mlp)


def test_merging_into_its_banks_is_refused(setting):
    _, theirs, _, lora = setting
    with pytest.raises(MatchError, match="foreign bank of experts.*bypass"):
        apply_lora(theirs, lora, 1.0, "merge")


def test_reasoning_needs_a_head(setting):
    from hywu_core.bases.hunyuan_image3.reason import reason

    _, theirs, edit, _ = setting
    with pytest.raises(ConditionError, match="no head for text"):
        reason(theirs, edit)


def test_a_generator_reads_its_condition(setting):
    _, theirs, edit, lora = setting
    handle = memory.load(FIXTURES / "pg_tiny")
    found = memory.generate(handle, read_edit(theirs, edit).condition)
    name = "model.layers.2.mlp.experts.w2"
    assert relative(found.factors[name].up, lora.factors[name].up) < 1e-5
