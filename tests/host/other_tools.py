"""LoRAs as other tools write them, in every spelling and kind, for tiny models, and the stock loader's weights."""

import functools
import math

import comfy.lora
import comfy.sd
import families
import torch

STRENGTH = 0.7


RANK = 3


# {the end of the key of up: the end of the key of down}, as trainers write them
PAIRS = {
    ".lora_up.weight": ".lora_down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora.down.weight",
    ".lora_B": ".lora_A",
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    ".lora_B.default.weight": ".lora_A.default.weight",
}


def model_of(name):
    return (families.FAMILIES | families.UNETS)[name]().model


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape))) * 0.1


def low_rank(name, shape, up=".lora_up.weight", alpha=2.0):
    """One pair for a weight of a shape; a convolution's down factor has its kernel."""
    tail = (1,) * (len(shape) - 2)
    state = {name + up: noise(shape[0], RANK, *tail), name + PAIRS[up]: noise(RANK, *shape[1:])}
    return state | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def loha(name, shape):
    columns = math.prod(shape[1:])
    ups, downs = ("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b")
    state = {f"{name}.{key}": noise(shape[0], RANK) * 5 for key in ups}
    return state | {f"{name}.{key}": noise(RANK, columns) * 5 for key in downs} | {f"{name}.alpha": torch.tensor(2.0)}


def lokr(name, shape):
    rows, columns = shape[0] // 2, math.prod(shape[1:]) // 2
    if shape[0] % 2 or math.prod(shape[1:]) % 2 or len(shape) > 2:
        return {}
    return {f"{name}.lokr_w1": noise(2, 2) * 3, f"{name}.lokr_w2": noise(rows, columns) * 3}


def lokr_factored(name, shape):
    whole = lokr(name, shape)
    if not whole:
        return {}
    parts = {f"{name}.lokr_w2_a": noise(shape[0] // 2, RANK), f"{name}.lokr_w2_b": noise(RANK, shape[1] // 2)}
    return parts | {f"{name}.lokr_w1": noise(2, 2) * 3, f"{name}.alpha": torch.tensor(2.0)}


def oft(name, shape):
    return (
        {} if shape[0] % 4 else {f"{name}.oft_blocks": noise(shape[0] // 4, 4, 4), f"{name}.alpha": torch.tensor(0.0)}
    )


def boft(name, shape):
    return (
        {}
        if shape[0] % 4
        else {f"{name}.oft_blocks": noise(1, shape[0] // 4, 4, 4), f"{name}.alpha": torch.tensor(0.0)}
    )


def glora(name, shape):
    if len(shape) > 2:
        return {}
    rows, columns = shape
    # the host takes square ones for an older format, so the older format it is there
    new = {"a1": noise(columns, RANK), "a2": noise(RANK, columns), "b1": noise(rows, RANK), "b2": noise(RANK, columns)}
    old = {"a1": noise(RANK, columns), "a2": noise(columns, RANK), "b1": noise(RANK, columns), "b2": noise(rows, RANK)}
    return {f"{name}.{key}.weight": tensor for key, tensor in (old if rows == columns else new).items()}


def dora(name, shape):
    return low_rank(name, shape) | {f"{name}.dora_scale": noise(shape[0], *(1,) * (len(shape) - 1)).abs() + 0.5}


def locon(name, shape):
    if len(shape) != 4:
        return {}
    state = low_rank(name, (*shape[:2], 1, 1))
    return state | {f"{name}.lora_mid.weight": noise(RANK, RANK, *shape[2:])}


def with_bias(name, shape):
    return low_rank(name, shape) | {f"{name}.diff_b": noise(shape[0])}


def norm(name, shape):
    return {f"{name}.w_norm": noise(*shape), f"{name}.b_norm": noise(*shape)} if len(shape) == 1 else {}


def only(name, shape):
    return {f"{name}.diff": noise(*shape)}


def replaced(name, shape):
    return {f"{name}.set_weight": noise(*shape)}


# {kind: the state of one target}; a kind that a shape cannot have gives nothing
KINDS = {
    "LoHa": loha, "LoKr": lokr, "LoKr, factored": lokr_factored, "OFT": oft, "BOFT": boft, "GLoRA": glora, "DoRA": dora,
    "LoCon with a middle factor": locon, "LoRA and bias": with_bias, "norm": norm, "difference": only,
    "replacement": replaced,
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def entries(model):
    """{a name in the host's table: (key, offset, function, the shape of what it changes)} for what carries weights."""
    weights, found = model.model.state_dict(), {}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
        if key not in weights or not key.startswith("diffusion_model."):
            continue
        shape = list(weights[key].shape)
        if offset is not None:
            # the table's figures are those of real models: a slice of a tiny one may end beyond it
            if offset[1] + offset[2] > shape[offset[0]]:
                continue
            shape[offset[0]] = offset[2]
        if shape:
            found[name] = (key, offset, function, tuple(shape))
    return found


def able(model, kind):
    """The names whose weights a kind can change."""
    of_any = kind in ("difference", "replacement")
    found = entries(model).items()
    if kind == "norm":
        return {name for name, (key, *_) in found if key.endswith(".weight")}
    return {name for name, (*_, shape) in found if len(shape) >= 2 or of_any}


def files(model, make, names=None):
    """States that hold every name of the table once; the stock loader keeps one of two names of a weight in a file."""
    rounds: list[tuple[set, dict]] = []
    for name, (key, offset, _, shape) in entries(model).items():
        if names is not None and name not in names:
            continue
        state = make(name, shape)
        place = (key, offset and offset[:2])
        if state:
            free = next((r for r in rounds if place not in r[0]), None)
            if free is None:
                rounds.append(free := (set(), {}))
            free[0].add(place)
            free[1].update(state)
    return [state for _, state in rounds]


def stock(model, state, strength=STRENGTH):
    return comfy.sd.load_lora_for_models(model, None, dict(state), strength, 0)[0]


def changed(patched, keys=None):
    """{key: weight} of everything that a MODEL's patches change."""
    weights = patched.model.state_dict()
    keys = patched.patches if keys is None else keys
    return {
        key: comfy.lora.calculate_weight(patched.patches.get(key, []), weights[key].clone().float(), key)
        for key in keys
    }


def same_change(model, found, expected):
    """Whether two patched models have the same weights, to 1e-3 of what was changed. Most are the same to the bit."""
    assert set(found.patches) == set(expected.patches)
    ours, theirs, base = changed(found), changed(expected), model.model.state_dict()
    for key, weight in theirs.items():
        size = (weight - base[key]).norm()
        assert size > 0, f"{key}: the LoRA must change the weight, or nothing was tested"
        assert (ours[key] - weight).norm() <= 1e-3 * size, key
    return sum(torch.equal(ours[key], theirs[key]) for key in theirs), len(theirs)


def bfl_control(model):
    state = {}
    for key, tensor in model.model.state_dict().items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.endswith("_norm.weight"):
            state[f"{name}.scale"] = noise(*tensor.shape)
        elif tensor.ndim == 2:
            state |= low_rank(name, tensor.shape, ".lora_B.weight", None) | {
                f"{name}.lora_B.bias": noise(tensor.shape[0])
            }
    return state


def uso(model):
    state = {}
    for index in range(19):
        for which in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
            rows = 96 if "qkv" in which else 32
            state[f"double_blocks.{index}.processor.{which}.down.weight"] = noise(RANK, 32)
            state[f"double_blocks.{index}.processor.{which}.up.weight"] = noise(rows, RANK)
    for index in range(38):
        for which, rows, columns in (("qkv_lora", 96, 32), ("proj_lora", 32, 96)):
            state[f"single_blocks.{index}.processor.{which}.down.weight"] = noise(RANK, columns)
            state[f"single_blocks.{index}.processor.{which}.up.weight"] = noise(rows, RANK)
    return state


def wan_fun(model):
    weights = model.model.state_dict()
    names = {
        f"lora_unet__{key[16:-7].replace('.', '_')}": tensor.shape
        for key, tensor in weights.items()
        if tensor.ndim == 2
    }
    state = {}
    for name, shape in names.items():
        state |= low_rank(name, shape)
    return state


def named(model, pattern):
    """A state of every weight of two axes that the host's table has under a name that starts like this, one name for each."""
    names = {name for name, (*_, shape) in entries(model).items() if name.startswith(pattern) and len(shape) == 2}
    return files(model, low_rank, names)[0]
