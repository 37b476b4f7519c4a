"""Models of transformers with structured layers: everything their users do, on tiny ones with random weights."""

import contextlib
import copy
import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from torch import nn  # noqa: E402

import structops as so  # noqa: E402
from structops.torch import (  # noqa: E402
    StructuredLinear,
    densify,
    export_dense,
    load,
    param_groups,
    save_pretrained,
    structurize,
    survey,
)

pytestmark = pytest.mark.torch

TINY = {"vocab_size": 64, "initializer_range": 0.2}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{**TINY, **TOKENS, "loss_type": "ForCausalLM"},
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            **{f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")},
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, **WIDE, **TOKENS, num_key_value_heads=2)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TINY, **WIDE, **TOKENS, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, **WIDE, **TOKENS, num_key_value_heads=2, num_local_experts=4)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**TINY, **WIDE, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            dropout_rate=0,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDE, initializer_range=0.2, image_size=16, patch_size=4)
    ),
    "whisper": lambda: transformers.WhisperModel(
        transformers.WhisperConfig(
            vocab_size=64,
            d_model=32,
            init_std=0.2,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
            **TOKENS,
        )
    ),
}
DEEP = ["gpt2", "llama", "vit"]
HEADS = {"gpt2", "llama", "qwen3", "mixtral", "t5"}  # their head is called lm_head


@functools.cache
def _made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def dense(name):
    return copy.deepcopy(_made(name))


@functools.cache
def _small(name):
    return structurize(_made(name), "btt")


def small(name):
    """The model with every layer but the head structured, in evaluation mode."""
    return copy.deepcopy(_small(name))


def inputs(name, dtype=torch.float32, labels=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    if name == "vit":
        given = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
        return {**given, "labels": torch.tensor([0, 1])} if labels else given
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator).to(dtype), "decoder_input_ids": ids}
    if labels:
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@torch.no_grad()
def outputs(model, name, **options):
    return model(**inputs(name, **options))[0]


def structured_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, StructuredLinear)}


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_but_heads_are_structured(name):
    model = small(name)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    kept = {key for key, layer in model.named_modules() if isinstance(layer, kinds)}
    head = {"bert": {"cls.predictions.decoder"}, "vit": {"classifier"}, "whisper": set()}.get(name, {"lm_head"})
    assert kept == head
    assert len(structured_layers(model)) == sum(isinstance(x, kinds) for x in dense(name).modules()) - len(head)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense(name).parameters())
    if name == "mixtral":
        assert [row.name for row in survey(model).kept if "expert" in row.reason]


def full_rank(name, layer):
    """Structures that hold any weight, a different one for every other layer."""
    n, m = (layer.nx, layer.nf) if hasattr(layer, "nx") else (layer.in_features, layer.out_features)
    if name.endswith("lm_head") or name == "cls.predictions.decoder":
        return False
    return f"low_rank(rank={min(n, m)})" if len(name) % 2 else "dense"


@pytest.mark.parametrize("name", MODELS)
def test_structures_that_hold_every_weight_change_nothing(name):
    dtype = torch.float32 if name == "mixtral" else torch.float64  # the experts of transformers take no float64
    model = dense(name).to(dtype)
    same = structurize(model, None, full_rank)
    given = inputs(name, dtype)
    with torch.no_grad():
        close = {"atol": 1e-4, "rtol": 1e-4} if name == "mixtral" else {}
        torch.testing.assert_close(same(**given)[0], model(**given)[0], **close)
    back = densify(same)
    assert list(back.state_dict()) == list(model.state_dict())
    assert [type(layer) for layer in back.modules()] == [type(layer) for layer in model.modules()]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, **close)


@pytest.mark.parametrize("name", MODELS)
def test_the_densified_model_computes_the_same(name):
    model = small(name)
    back = densify(model)
    torch.testing.assert_close(outputs(back, name), outputs(model, name), atol=1e-4, rtol=1e-4)
    assert list(back.state_dict()) == list(dense(name).state_dict())
    assert dense(name).load_state_dict(back.state_dict()) == ([], [])
    assert not torch.allclose(outputs(model, name), outputs(dense(name), name), atol=1e-2), "btt is no full rank"


@pytest.mark.parametrize(
    ("name", "spec", "select", "found"),
    [
        ("gpt2", "monarch(blocks=4)", "*.mlp.*", {"monarch(blocks=4)": 4}),
        ("gpt2", {"*.attn.*": "kron", "*.c_proj": "low_rank(rank=4)"}, None, {"kron": 2, "low_rank(rank=4)": 4}),
        ("llama", "low_rank(rank=4)", ["*.q_proj", "*.o_proj"], {"low_rank(rank=4)": 4}),
        ("llama", {"*": "tt(rank=2)", "lm_head": None, "*.mlp.*": "blast(rank=3, blocks=2)"}, None,
         {"tt(rank=2)": 8, "blast(rank=3, blocks=2)": 6}),
        ("vit", "monarch(blocks=4)", {"*.fc1": True, "*.q_proj": "toeplitz"}, {"monarch(blocks=4)": 2, "toeplitz": 2}),
        ("t5", "btt", "*.wo", {"btt": 4}),
        ("mixtral", "btt", "*self_attn*", {"btt": 8}),
    ],
)  # fmt: skip
def test_selections(name, spec, select, found, tmp_path):
    model = structurize(dense(name), spec, select)
    texts = [str(layer.structure) for layer in structured_layers(model).values()]
    assert {text: texts.count(text) for text in texts} == found
    save_pretrained(model, tmp_path)
    assert torch.equal(outputs(load(tmp_path), name), outputs(model, name))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "bert", "t5", "mixtral", "qwen3"])
def test_training_lowers_the_loss(name):
    model = structurize(dense(name), "btt", init="mup").train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, weight_decay=0.01))
    given, losses = inputs(name, labels=True), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses
    for key, layer in structured_layers(model).items():
        assert all(factor.grad is not None for factor in layer.factors), key


@pytest.mark.parametrize("name", DEEP)
def test_activation_checkpointing_changes_no_gradient(name):
    plain, saving = small(name).train(), small(name).train()
    saving.activation_checkpointing_enable()
    given = inputs(name, labels=True)
    if name != "vit":
        given["use_cache"] = False
    for model in (plain, saving):
        model(**given).loss.backward()
    grads = dict(saving.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, msg=key)


@pytest.mark.parametrize("name", DEEP)
def test_frozen_layers_stay_frozen_as_adapters_need_them(name, tmp_path):
    model = dense(name).requires_grad_(False)
    head = model.classifier if name == "vit" else model.lm_head
    head.requires_grad_(True)
    frozen = structurize(model, "btt")
    assert all(not p.requires_grad for layer in structured_layers(frozen).values() for p in layer.parameters())
    learns = {key for key, p in frozen.named_parameters() if p.requires_grad}
    assert learns == {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in densify(frozen).named_parameters() if p.requires_grad} == learns
    frozen(**inputs(name, labels=True)).loss.backward()
    assert {key for key, p in frozen.named_parameters() if p.grad is not None} == learns
    assert frozen.num_parameters(only_trainable=True) == sum(p.numel() for p in head.parameters())


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back(name, dtype, tmp_path):
    model = small(name).to(dtype)
    save_pretrained(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    for one, two in (
        (model.state_dict(), again.state_dict()),
        (dict(model.named_parameters()), dict(again.named_parameters())),
        (dict(model.named_buffers()), dict(again.named_buffers())),
    ):
        assert list(one) == list(two)
        for key, value in one.items():
            assert value.dtype == two[key].dtype, key
            assert torch.equal(value, two[key]), key
    assert torch.equal(outputs(again, name, dtype=dtype), outputs(model, name, dtype=dtype))
    assert again.config.to_dict() == {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
    }
    if name in HEADS and model.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    cast = load(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in cast.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", DEEP)
def test_it_loads_into_a_model_given(name, tmp_path):
    model = small(name)
    save_pretrained(model, tmp_path)
    for given in (dense(name), small(name), lambda: dense(name), MODELS[name], structurize(dense(name), "kron")):
        again = load(tmp_path, given)
        assert torch.equal(outputs(again.eval(), name), outputs(model, name))
        assert {layer.kind for layer in structured_layers(again).values()} == {"Conv1D" if name == "gpt2" else "Linear"}
        assert list(densify(again).state_dict()) == list(dense(name).state_dict())


def test_settings_of_generation_come_back(tmp_path):
    model = small("llama")
    model.generation_config.max_new_tokens = 3
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    save_pretrained(model, tmp_path)
    again = load(tmp_path).generation_config
    assert (again.max_new_tokens, again.do_sample, again.temperature) == (3, True, 0.7)


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_read_by_from_pretrained(name, tmp_path):
    model = small(name)
    export_dense(model, tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not structured_layers(plain)
    torch.testing.assert_close(outputs(plain, name), outputs(model, name), atol=1e-4, rtol=1e-4)
    with pytest.raises(so.CheckpointError, match="dense checkpoint"):
        load(tmp_path)


def test_from_pretrained_refuses_what_it_would_fill_with_random_weights(tmp_path):
    model = small("gpt2")
    save_pretrained(model, tmp_path)
    for kind in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"load this folder by structops\.torch\.load"):
            kind.from_pretrained(tmp_path)
    again = load(tmp_path)
    assert not hasattr(again.config, "transformers_weights")
    export_dense(again, tmp_path)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)


def test_a_dense_model_that_was_saved_is_an_ordinary_checkpoint(tmp_path):
    model = dense("llama")
    save_pretrained(model, tmp_path)
    for again in (load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert torch.equal(outputs(again, "llama"), outputs(model, "llama"))


def test_what_the_model_saves_itself_has_no_structures(tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(so.CheckpointError, match=r"structops\.torch\.save_pretrained"):
        load(tmp_path)


def test_classes_that_transformers_lacks_are_given(tmp_path):
    class Mine(transformers.LlamaForCausalLM):
        """A user's own."""

    torch.manual_seed(0)
    model = structurize(Mine(_made("llama").config).eval(), "btt")
    save_pretrained(model, tmp_path)
    with pytest.raises(so.CheckpointError, match=r"Mine, which structops cannot build"):
        load(tmp_path)
    again = load(tmp_path, lambda: Mine(model.config)).eval()
    assert torch.equal(outputs(again, "llama"), outputs(model, "llama"))
    (tmp_path / "config.json").unlink()
    save_pretrained(small("llama"), tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(so.CheckpointError, match=r"has no config\.json"):
        load(tmp_path / "other")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_models_load_onto_a_gpu(name, tmp_path):
    model = small(name)
    save_pretrained(model, tmp_path)
    again = load(tmp_path, device="cuda")
    assert {t.device.type for t in [*again.parameters(), *again.buffers()]} == {"cuda"}
    with torch.no_grad():
        y = again(**{key: value.cuda() for key, value in inputs(name).items()})[0]
    torch.testing.assert_close(y.cpu(), outputs(model, name), atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------- what users do with them


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generated_tokens_are_those_of_the_dense_model(name, use_cache, tmp_path):
    model = small(name).double()
    ids = inputs(name)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **options)
    assert torch.equal(densify(model).generate(ids, **options), tokens)
    save_pretrained(model, tmp_path)
    assert torch.equal(load(tmp_path).generate(ids, **options), tokens)
    assert len(set(tokens[0, -8:].tolist())) > 1 or name == "t5"


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_compiles_to_one_graph(name):
    model, given = small(name), inputs(name)
    if name != "vit":
        given["use_cache"] = False  # the cache of a model that is called for the first time is made outside of a graph
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_a_part_compiles_by_inductor_forward_and_backward():
    block = small("vit").vit.layers[0].mlp
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    grads = []
    for run in (block, compiled):
        block.zero_grad()
        y = run(x)
        y.square().mean().backward()
        grads.append([y.detach(), *(p.grad for p in block.parameters())])
    for plain, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_exports(tmp_path):
    model, x = small("vit"), inputs("vit")["pixel_values"]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"pixel_values": {0: batch}})
    torch.export.save(program, tmp_path / "vit.pt2")
    again = torch.export.load(tmp_path / "vit.pt2").module()
    more = torch.cat([x, x + 1, x - 1])
    with torch.no_grad():
        torch.testing.assert_close(again(more).logits, model(more).logits)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_mixed_precision_is_near_the_dense_model_in_float32(name, how):
    """Gradients of all parameters that dense and structured models share, to a few units of bfloat16 (2**-8)."""
    model = small(name).train()
    plain = densify(model)
    given = inputs(name, labels=True)
    plain(**given).loss.backward()
    exact = {key: p.grad for key, p in plain.named_parameters()}
    exact_loss = plain(**given).loss.item()
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
        context = contextlib.nullcontext()
        given = inputs(name, torch.bfloat16, labels=True)
    else:
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    with context:
        loss = model(**given).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact_loss, rel=0.03)
    shared = [(key, p) for key, p in model.named_parameters() if key in exact]
    assert len(shared) > 4
    for key, parameter in shared:
        assert parameter.grad.dtype == parameter.dtype
        if key.endswith("k_proj.bias"):
            continue  # softmax does not change with a bias of the keys: the exact gradient is zero
        error = (parameter.grad.float() - exact[key]).norm() / exact[key].norm()
        assert error < 0.1, key


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_gpu(name, dtype):
    model = small(name).train().cuda()
    plain = densify(model)
    given = {key: value.cuda() for key, value in inputs(name, labels=True).items()}
    with torch.autocast("cuda", dtype=dtype):
        loss = model(**given).loss
    loss.backward()
    assert loss.item() == pytest.approx(plain(**given).loss.item(), rel=0.03)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_casting_the_whole_model(name):
    model = small(name)
    expected = outputs(model, name)
    if name != "mixtral":  # the experts of transformers take no float64
        exact = outputs(copy.deepcopy(model).to(torch.float64), name, dtype=torch.float64)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact.float(), expected, atol=1e-3, rtol=1e-3)
    half = copy.deepcopy(model).half()
    assert {p.dtype for p in half.parameters()} == {torch.float16} == {half.dtype}
    y = outputs(half, name, dtype=torch.float16)
    assert y.dtype == torch.float16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", DEEP)
def test_copies_and_pickles_of_whole_modules(name, tmp_path):
    model = small(name)
    clone = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    pickled = torch.load(tmp_path / "model.pt", weights_only=False)
    expected = outputs(model, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (clone, pickled):
        assert torch.equal(outputs(other, name), expected)
    if name == "gpt2":
        assert pickled.lm_head.weight is pickled.transformer.wte.weight


def test_gradients_of_single_samples_by_torch_func():
    torch.manual_seed(0)
    mlp = small("vit").vit.layers[0].mlp.double()
    x = torch.randn(5, 32, dtype=torch.float64)
    parameters = dict(mlp.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(mlp, parameters, (sample,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k, sample in enumerate(x):
        mlp.zero_grad()
        mlp(sample).square().sum().backward()
        for key, parameter in mlp.named_parameters():
            torch.testing.assert_close(grads[key][k], parameter.grad)


# ------------------------------------------------------------------------------- what transformers does with its layers


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_not_drawn_again(name, tmp_path):
    """``init_weights`` skips what it knows to be set; ``from_pretrained`` and ``resize`` call it too."""
    save_pretrained(small(name), tmp_path)
    for model in (small(name), load(tmp_path)):
        before = copy.deepcopy(model.state_dict())
        model.init_weights()
        model.tie_weights()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_vocabularies_are_resized(name):
    model = small(name)
    before = outputs(model, name)
    model.resize_token_embeddings(70, mean_resizing=False)
    after = outputs(model, name)
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :64], before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted(name):
    model = small(name)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    saved = survey(model).saved
    assert saved > 0
    assert dense(name).num_parameters() - model.num_parameters() == saved
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.get_memory_footprint() < dense(name).get_memory_footprint()
