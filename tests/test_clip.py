"CLIP: the loss against a loop and across processes, the published weights against another implementation, the weights that ship."
import json, math, os, subprocess, sys, warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from minisora import clip, core
from minisora.clip import CLIP, CLIPConfig, contrastive_loss, load_clip, prototypes, published, zero_shot
from minisora.text import Tokenizer
from minisora.world import VERSION, World
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a red circle", "a small blue star on a white background", "a green moon", "a large pink bar"]


def unit(*shape, seed=0): return F.normalize(torch.randn(shape, generator=core.generator(seed)), dim=-1)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return CLIP(CLIPConfig(Tokenizer.from_texts(TEXTS).vocab_size, width=32, depth=1, heads=2, text_width=48, text_depth=1, text_heads=2, embed=16), Tokenizer.from_texts(TEXTS)).eval()


# --- the loss

def test_loss_is_the_double_loop():
    a, b, s = unit(7, 5).double(), unit(7, 5, seed=1).double(), 13.
    total = sum(-math.log(math.exp(s*float(x @ y[i]))/sum(math.exp(s*float(x @ z)) for z in y)) for u, y in ((a, b), (b, a)) for i, x in enumerate(u))
    assert contrastive_loss(a, b, s).item() == pytest.approx(total/14, rel=1e-5)


def test_limits_and_order():
    one, eye = torch.ones(16, 1), torch.eye(16)
    assert contrastive_loss(one, one, 3.).item() == pytest.approx(math.log(16), rel=1e-6) and contrastive_loss(eye, eye, 100.).item() < 1e-6
    a, b, p = unit(16, 8), unit(16, 8, seed=1), torch.randperm(16, generator=core.generator(2))
    torch.testing.assert_close(contrastive_loss(a[p], b[p], 9.), contrastive_loss(a, b, 9.))
    torch.testing.assert_close(contrastive_loss(b, a, 9.), contrastive_loss(a, b, 9.))
    assert contrastive_loss(a[:1], b[:1], 9.) == 0


def test_copies_are_left_out():
    a, b, ids = unit(6, 8), unit(6, 8, seed=1), torch.tensor([[1, 0], [2, 3], [4, 0], [5, 0], [6, 0], [7, 0]])
    torch.testing.assert_close(contrastive_loss(a, b, 9., ids), contrastive_loss(a, b, 9.))
    eye = torch.eye(6).repeat(2, 1)                      # all known, every caption twice
    assert contrastive_loss(eye, eye, 100.).item() == pytest.approx(math.log(2), rel=1e-5) and contrastive_loss(eye, eye, 100., ids.repeat(2, 1)).item() < 1e-6
    ids[1] = ids[0]                                      # by hand: cells (0, 1) and (1, 0) are out of the table, all else is in it
    logits = 9*a @ b.T
    logits[0, 1] = logits[1, 0] = -1e9
    want = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean()/2
    torch.testing.assert_close(contrastive_loss(a, b, 9., ids), want)
    assert contrastive_loss(a, b, 9., torch.ones(6, 2, dtype=torch.long)) == 0      # nothing but copies: nothing to tell apart


def test_gradients_are_finite_and_right():
    a, b, s = unit(4, 3).double().requires_grad_(), unit(4, 3, seed=1).double().requires_grad_(), torch.tensor(5., dtype=torch.double, requires_grad=True)
    def plain(a, b, s): return (F.cross_entropy(s*a @ b.T, torch.arange(4)) + F.cross_entropy(s*b @ a.T, torch.arange(4)))/2
    for mine, other in zip(torch.autograd.grad(contrastive_loss(a, b, s), (a, b, s)), torch.autograd.grad(plain(a, b, s), (a, b, s))): torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_loss_is_the_same_under_autocast():
    a, b = unit(64, 32), unit(64, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16): assert contrastive_loss(a, b, 90.).item() == pytest.approx(contrastive_loss(a, b, 90.).item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16): inside = contrastive_loss(a, b, 90.)
    torch.testing.assert_close(inside, contrastive_loss(a, b, 90.))


def test_bad_batches():
    for a, b, ids in ((unit(4, 8), unit(3, 8), None), (unit(4, 8), unit(4, 7), None), (unit(8), unit(8), None), (unit(4, 8), unit(4, 8), torch.ones(3, 2))):
        with pytest.raises(ValueError, match="expected"): contrastive_loss(a, b, 1., ids)


WORKER = """
import json, os, sys, torch, torch.distributed as dist
from minisora.clip import CLIP, CLIPConfig
torch.set_num_threads(1)
rank, ranks, file, out = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
g = torch.Generator().manual_seed(5)
pixels, text = torch.rand(8, 3, 16, 16, generator=g)*2 - 1, torch.randint(1, 6, (8, 2), generator=g)
text[5] = text[0]                                                  # a copy on the other rank
result = {}
for name, copies in (("plain", True), ("masked", False)):
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(300, side=16, patch=8, width=16, depth=1, heads=2, text_width=16, text_depth=1, text_heads=2, embed=8))
    mine = slice(4*rank, 4*rank + 4)
    loss, _ = model.loss(pixels[mine], torch.nn.functional.pad(text[mine], (0, rank)), copies)      # rank 1 padded its texts further
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad); p.grad /= ranks                   # as DistributedDataParallel does
    grads = {k: p.grad for k, p in model.named_parameters()}
    if rank == 0:
        every = dist.is_initialized
        dist.is_initialized = lambda: False                        # the same batch in one process
        model.zero_grad()
        whole, _ = model.loss(pixels, text, copies)
        whole.backward()
        dist.is_initialized = every
        result[name] = abs(loss.item() - whole.item()), max((grads[k] - p.grad).abs().max().item() for k, p in model.named_parameters()), max(p.grad.abs().max().item() for p in model.parameters())
    said = [torch.zeros(()) for _ in range(ranks)]
    dist.all_gather(said, loss.detach())
    assert said[0] == said[1]
if rank == 0: open(out, "w").write(json.dumps(result))
dist.destroy_process_group()
"""


def test_two_ranks_are_one_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(r), str(tmp_path / "meet"), str(tmp_path / "out")], env=env, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    try: errors = [p.communicate(timeout=240)[1] for p in ranks]
    finally:
        for p in ranks: p.kill()
    assert [p.returncode for p in ranks] == [0, 0], errors
    for loss, grad, size in json.loads((tmp_path / "out").read_text()).values(): assert loss < 1e-6 and grad < 1e-6 < 1e-3 < size


# --- the model

def test_one_text_by_itself_is_the_same_text(small):
    together = small.encode_text(small.ids(TEXTS))
    for i, t in enumerate(TEXTS): torch.testing.assert_close(small.encode_text(small.ids([t]))[0], together[i], rtol=1e-4, atol=1e-5)
    assert small.encode_text(small.ids([""])).isfinite().all()
    with pytest.warns(UserWarning, match="'zeppelin'"): assert (small.ids(["a zeppelin circle"]) == small.ids(["a circle"])).all()


def test_scores_are_cosines(small):
    x = torch.rand(3, 3, 32, 32, generator=core.generator(1))*2 - 1
    s = small.scores(x, TEXTS, chunk=2)
    image, text = small.encode_image(x), small.encode_text(small.ids(TEXTS))
    for i in range(3):
        for j in range(4): assert s[i, j].item() == pytest.approx(F.cosine_similarity(image[i], text[j], dim=0).item(), abs=1e-5)
    clips = torch.stack([x, x.flip(0)], 1)              # two frames
    torch.testing.assert_close(small.encode_image(clips), (image + image.flip(0))/2, rtol=1e-4, atol=1e-5)


def test_zero_shot_is_softmax_of_dot_products(small):
    x = torch.rand(5, 3, 32, 32, generator=core.generator(2))*2 - 1
    torch.testing.assert_close(zero_shot(small, x, TEXTS), (small.scale*small.scores(x, TEXTS)).softmax(1), rtol=1e-4, atol=1e-5)
    both = prototypes(small, ["red", "blue"], ["a {} circle", "a {} star"])
    each = [prototypes(small, ["red", "blue"], [t]) for t in ("a {} circle", "a {} star")]
    torch.testing.assert_close(both, F.normalize(each[0] + each[1], dim=-1), rtol=1e-4, atol=1e-5)
    for bad in (dict(names=[]), dict(names="red"), dict(names=["red"], templates=[]), dict(names=["red"], templates="{}"), dict(names=["red"], templates=["{} {}"]), dict(names=["red"], templates=["none"])):
        with pytest.raises(ValueError, match="expected"): zero_shot(small, x, **bad)


def test_scale_is_clamped(small):
    torch.manual_seed(0)
    model = CLIP(small.config)
    assert model.scale.item() == pytest.approx(1/.07, rel=1e-5)
    with torch.no_grad(): model.logit_scale.fill_(9.)
    assert model.scale.item() == pytest.approx(100, rel=1e-5)


def test_it_learns_to_tell_pictures_apart():
    torch.manual_seed(0)
    W, words = World(frames=1), Tokenizer.from_texts(TEXTS)
    model = CLIP(CLIPConfig(words.vocab_size, width=32, depth=1, heads=2, text_width=32, text_depth=1, text_heads=2, embed=16), words)
    x, ids = W.render(W.sample(4, core.generator(0)))[:, 0], model.ids(TEXTS)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(60):
        loss, factor = model.loss(x, ids)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < .3 and model.scores(x, TEXTS).argmax(1).tolist() == [0, 1, 2, 3]


def test_bad_input(small):
    x = torch.zeros(1, 3, 32, 32)
    for wrong in (lambda: small.encode_image(x[:, :1]), lambda: small.encode_image(x[..., :16]), lambda: small.encode_image(x[0]), lambda: small.encode_text(torch.ones(1, 99, dtype=torch.long)),
                  lambda: small.ids(["circle "*40]), lambda: CLIPConfig(9, side=33), lambda: CLIPConfig(9, end=2.5), lambda: CLIP(small.config).ids(["a"])):
        with pytest.raises(ValueError, match="expected"): wrong()


def test_saved_and_loaded(small, tmp_path):
    x = torch.rand(2, 3, 32, 32, generator=core.generator(3))
    file = small.save_pretrained(tmp_path, seed=7)
    again = CLIP.from_pretrained(tmp_path)
    assert torch.equal(again.scores(x, TEXTS), small.scores(x, TEXTS)) and again.card["seed"] == 7 and again.tokenizer.words == small.tokenizer.words
    small.save_pretrained(tmp_path / "half.safetensors", half=True)
    torch.testing.assert_close(CLIP.from_pretrained(tmp_path / "half.safetensors").scores(x, TEXTS), small.scores(x, TEXTS), rtol=0, atol=5e-3)
    bare = CLIP(small.config)
    assert CLIP.from_pretrained(bare.save_pretrained(tmp_path / "bare")).tokenizer is None
    tensors, card = core.load(file)
    for change, words in ((dict(kind="sora"), "holds sora"), (dict(config=dict(vocab=9)), "does not fit"), (dict(config=dict(nope=1)), "does not fit"), (dict(words=["Two Words"]), "does not fit")):
        core.save(file, tensors, {**card, **change})
        with pytest.raises(core.UserError, match=words): CLIP.from_pretrained(tmp_path)
    with pytest.raises(core.UserError, match="no weights at nowhere: expected"): CLIP.from_pretrained("nowhere")


# --- the published weights

SHAPES = (dict(width=64, depth=1, heads=1, text_width=128, text_depth=2, text_heads=2, embed=32, side=16, patch=8, vocab=60, length=9),
          dict(width=128, depth=3, heads=2, text_width=64, text_depth=1, text_heads=1, embed=48, side=48, patch=16, vocab=90, length=14))


def other(s, eos, seed=0, act="quick_gelu"):
    "The independent implementation with random weights; biases and norms too, which it would leave at nought and one."
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=s["text_width"], intermediate_size=4*s["text_width"], num_hidden_layers=s["text_depth"], num_attention_heads=s["text_heads"], vocab_size=s["vocab"], hidden_act=act,
                max_position_embeddings=s["length"], eos_token_id=eos, bos_token_id=1, pad_token_id=0)
    vision = dict(hidden_size=s["width"], intermediate_size=4*s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"], image_size=s["side"], patch_size=s["patch"], hidden_act=act)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=s["embed"])).eval()
    g = core.generator(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g)*(.5/p.shape[-1]**.5 if p.ndim > 1 else .3) + (p.ndim == 1)*.5)
    return model


def openai_names(state):
    "The port's tensors under OpenAI's names: written from OpenAI's model.py, one line per tensor, sharing nothing with the library."
    out, get = {}, lambda k: state[k].clone()
    for head, theirs in (("", "text_model"), ("visual.", "vision_model")):
        i = 0
        while f"{theirs}.encoder.layers.{i}.layer_norm1.weight" in state:
            a, b = f"{head}transformer.resblocks.{i}.", f"{theirs}.encoder.layers.{i}."
            for kind in ("weight", "bias"):
                out[f"{a}attn.in_proj_{kind}"] = torch.cat([get(f"{b}self_attn.{n}_proj.{kind}") for n in "qkv"])
                out[f"{a}attn.out_proj.{kind}"] = get(f"{b}self_attn.out_proj.{kind}")
                out[f"{a}ln_1.{kind}"], out[f"{a}ln_2.{kind}"] = get(f"{b}layer_norm1.{kind}"), get(f"{b}layer_norm2.{kind}")
                out[f"{a}mlp.c_fc.{kind}"], out[f"{a}mlp.c_proj.{kind}"] = get(f"{b}mlp.fc1.{kind}"), get(f"{b}mlp.fc2.{kind}")
            i += 1
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = get(f"text_model.final_layer_norm.{kind}")
        out[f"visual.ln_pre.{kind}"], out[f"visual.ln_post.{kind}"] = get(f"vision_model.pre_layrnorm.{kind}"), get(f"vision_model.post_layernorm.{kind}")
    out["token_embedding.weight"], out["positional_embedding"] = get("text_model.embeddings.token_embedding.weight"), get("text_model.embeddings.position_embedding.weight")
    out["visual.class_embedding"], out["visual.conv1.weight"] = get("vision_model.embeddings.class_embedding"), get("vision_model.embeddings.patch_embedding.weight")
    out["visual.positional_embedding"] = get("vision_model.embeddings.position_embedding.weight")
    out["text_projection"], out["visual.proj"], out["logit_scale"] = get("text_projection.weight").T.contiguous(), get("visual_projection.weight").T.contiguous(), get("logit_scale")
    return out | dict(input_resolution=torch.tensor(224), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))    # as OpenAI's files have them


@pytest.mark.parametrize("s", SHAPES, ids=["small", "larger"])
def test_a_plain_gelu_is_the_exact_one(s, tmp_path):
    theirs, g = other(s, 2, act="gelu"), core.generator(1)
    ours, pixels, ids = load_clip(theirs.state_dict(), quick_gelu=False), torch.randn(3, 3, s["side"], s["side"], generator=g), torch.randint(3, s["vocab"] - 1, (5, s["length"] - 2), generator=g)
    ids[:, 4:] = s["vocab"] - 1
    with torch.no_grad(): want = theirs(input_ids=ids, pixel_values=pixels)
    assert (F.normalize(ours.encode_image(pixels), dim=-1) - want.image_embeds).abs().max() < 1e-5 and (F.normalize(ours.encode_text(ids), dim=-1) - want.text_embeds).abs().max() < 1e-5
    assert CLIPConfig(**json.loads(json.dumps(asdict(ours.config)))) == ours.config and ours.config.exact_gelu


@pytest.mark.parametrize("names", ["port", "OpenAI"])
@pytest.mark.parametrize("eos", [2, 40], ids=["largest", "configured"])
@pytest.mark.parametrize("s", SHAPES, ids=["small", "larger"])
def test_equals_transformers(s, eos, names):
    theirs, g = other(s, eos), core.generator(1)
    ours = load_clip(openai_names(theirs.state_dict()) if names == "OpenAI" else theirs.state_dict(), end="largest" if eos == 2 else eos)
    pixels, ids = torch.randn(3, 3, s["side"], s["side"], generator=g), torch.randint(3, s["vocab"] - 1, (5, s["length"] - 2), generator=g)
    ids[ids == 40] = 41
    for row, at in zip(ids, (2, 4, 5, 6, 6)):            # the end of each text, then what may follow it
        row[at] = s["vocab"] - 1 if eos == 2 else 40
        row[at + 1:] = row[at] if at % 2 else 0
    with torch.no_grad(): want = theirs(input_ids=ids, pixel_values=pixels)
    image, text = F.normalize(ours.encode_image(pixels), dim=-1), F.normalize(ours.encode_text(ids), dim=-1)
    assert (image - want.image_embeds).abs().max() < 1e-4 and (text - want.text_embeds).abs().max() < 1e-4
    assert (ours.scale*image @ text.T - want.logits_per_image).abs().max() < 1e-4*max(1, want.logits_per_image.abs().max())
    with torch.no_grad(): raw = theirs.vision_model(pixel_values=pixels).pooler_output @ theirs.visual_projection.weight.T
    assert (ours.encode_image(pixels) - raw).abs().max() < 1e-4*max(1, raw.abs().max())
    assert image.std(0).max() > 1e-3 and text.std(0).max() > 1e-3          # pictures and texts that differ


def test_heads_and_activation():
    s = SHAPES[0]
    state = other(s, 2).state_dict()
    ids = torch.randint(1, 60, (2, 9), generator=core.generator(0))
    one, two, gelu = load_clip(state), load_clip(state, text_heads=4), load_clip(state, quick_gelu=False)
    assert one.config.heads == 1 and one.config.text_heads == 2 and two.config.text_heads == 4
    assert (one.encode_text(ids) - two.encode_text(ids)).abs().max() > 1e-3 and (one.encode_text(ids) - gelu.encode_text(ids)).abs().max() > 1e-4
    half = load_clip({k: v.half() for k, v in state.items()})                # OpenAI's files are half precision
    assert half.words.weight.dtype == torch.float32
    assert all(p.requires_grad for p in half.parameters())                   # to train on
    ids_buffers = {"text_model.embeddings.position_ids": torch.arange(9)[None], "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    assert torch.equal(load_clip({**state, **ids_buffers}).encode_text(ids), one.encode_text(ids))     # of older versions of the port


def test_bad_state_dicts():
    port = other(SHAPES[0], 2).state_dict()
    state = openai_names(port)
    def without(k, of=state): return {n: v for n, v in of.items() if n != k}
    for bad, words in ((without("visual.class_embedding"), "lacks visual.class_embedding"), (without("ln_final.bias"), r"lacks ln_final.bias: expected shape \(128,\)"), ({**state, "wat": torch.zeros(1)}, "has wat: expected no such key"),
                       ({**state, "visual.proj": torch.zeros(3, 32)}, r"visual.proj has shape \(3, 32\): expected \(64, 32\)"), ({**state, "visual.conv1.weight": torch.zeros(3)}, "expected 4 axes"), ({}, "lacks"),
                       (without("text_model.encoder.layers.0.self_attn.k_proj.bias", port), "has only q, v.*expected q, k and v"), (without("visual_projection.weight", port), "lacks visual.proj")):
        with pytest.raises(ValueError, match=words) as e: load_clip(bad)
        assert "\n" not in str(e.value)
    for heads in (dict(text_heads=3), dict(image_heads=0)):
        with pytest.raises(ValueError, match="expected a number that divides it"): load_clip(state, **heads)
    narrow = {k: v for k, v in published(CLIP(CLIPConfig(9, width=32, depth=1, heads=1, text_width=64, text_depth=1, text_heads=1, qk_norm=False))).items()}
    with pytest.raises(ValueError, match="image_heads is None, and that tower is 32 wide"): load_clip(narrow)
    assert load_clip(narrow, image_heads=2).config.heads == 2


# --- captions that are wrong in one thing

def test_near_captions_by_hand(small):
    "The loss with hard negatives is the contrastive one and the surprise at the first of each row, written as a loop."
    pixels, g = torch.rand(3, 3, 32, 32, generator=core.generator(2)) * 2 - 1, core.generator(3)
    text = small.ids(TEXTS[:3])
    near = torch.randint(257, small.config.vocab, (3, 4, 5), generator=g)
    loss, scale = small.loss(pixels, text, near=near)
    by_hand = small.loss(pixels, text)[0]
    for i in range(3):
        cosines = torch.stack([F.cosine_similarity(small.encode_image(pixels[i:i + 1]), small.encode_text(near[i, k][None]))[0] for k in range(4)])
        by_hand = by_hand + (torch.logsumexp(scale * cosines, 0) - scale * cosines[0]) / 3
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-4)


# --- one text each

def test_fits_is_the_diagonal_of_scores():
    W = World()
    words = Tokenizer.from_texts(W.caption(W.sample(300, core.generator(0)), "medium"))
    torch.manual_seed(1)
    model = CLIP(CLIPConfig(words.vocab_size, width=24, depth=1, heads=1, text_width=24, text_depth=1, text_heads=1, embed=8, length=6), words).eval()
    s = W.sample(4, core.generator(1))
    clips, texts = W.render(s), ["a red circle", "a large blue star", "small", "a square"]
    five = clips[:, [0, 4, 8, 12, 16]]
    assert torch.allclose(model.fits(clips, texts), model.scores(five, texts).diagonal(), atol=1e-5)
    assert torch.allclose(model.fits(clips[:, 0], texts), model.scores(clips[:, 0], texts).diagonal(), atol=1e-5) and torch.allclose(model.fits(clips[:, :1], texts), model.fits(clips[:, 0], texts), atol=1e-6)
    twice = clips.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(model.fits(twice, texts), model.fits(clips, texts), atol=1e-5)              # of any size
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                                                # in silence
        odd = model.fits(clips, ["a red circle zeppelin", "", "zeppelin", "a square" + " red circle"*40])
    assert torch.allclose(odd[0], model.fits(clips[:1], ["a red circle"])[0], atol=1e-6) and odd[1] == odd[2] == 0 and odd[3].isfinite()
    rows = [["a red circle", "a blue circle", "a star"], ["small"], "a large blue star", ["a square", "a star"]]
    cosines = model.scores(five, ["a red circle", "a blue circle", "a star", "small", "a large blue star", "a square"])
    want = [(model.scale*cosines[0, :3]).log_softmax(0)[0], torch.tensor(0.), cosines[2, 4], (model.scale*cosines[3, [5, 2]]).log_softmax(0)[0]]
    torch.testing.assert_close(model.fits(clips, rows), torch.stack(want), rtol=1e-4, atol=1e-4)


# --- the weights that ship

@pytest.mark.skipif(not (core.WEIGHTS / "clip.safetensors").is_file(), reason="not trained yet")
def test_shipped_weights_name_what_they_see():
    model, W = CLIP.from_pretrained("clip"), World(frames=1)
    card = model.card
    assert (core.WEIGHTS / "clip.safetensors").stat().st_size <= 3_000_000 and card["world"] == VERSION and card["command"].startswith("minisora train --preset clip") and card["flops"] > 0
    assert 3e5 < core.num_params(model) < 1e6
    s = W.sample(64, core.generator(2**43), "heldout")
    x = W.render(s)[:, 0]
    table = model.scores(x, W.caption(s, "long"))
    assert (table.argmax(1) == torch.arange(64)).float().mean() > .5           # chance 1.6%; raise it when longer-trained weights ship
    swapped = W.caption(replace(s, background=(s.background + 1) % 3), "long")
    assert (table.diagonal() > model.scores(x, swapped).diagonal()).float().mean() > .9


# --- heaps of pictures

@pytest.mark.parametrize("n, m, d", [(300, 200, 20), (5, 300, 20), (4, 3, 20), (2, 2, 3)])
def test_frechet_against_matrix_roots(n, m, d):
    "The formula as it is printed, with another library's square root; singular where there are fewer vectors than dimensions."
    linalg = pytest.importorskip("scipy.linalg")
    g = core.generator(n)
    x, y = (torch.randn(k, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + k for k in (n, m))
    a, b = x.T.cov().numpy(), y.T.cov().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(a)
        root = linalg.sqrtm(root.real @ b @ root.real)
    assert clip.frechet(x, y) == pytest.approx((x.mean(0) - y.mean(0)).square().sum().item() + (a + b - 2*root.real).trace(), rel=1e-4)


def test_frechet_known_answers():
    x = torch.randn(7, 30, generator=core.generator(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(30, 30, generator=core.generator(1), dtype=torch.float64)).Q
    spread, mean = x.var(0).sum().item(), x.mean(0)
    assert clip.frechet(x, x) < 1e-9 and clip.frechet(x, x.flip(0)) < 1e-9 and abs(clip.frechet(x, x + 2) - 4*30) < 1e-9
    assert clip.frechet(x, 3*x) == pytest.approx(4*mean.square().sum().item() + 4*spread)               # Gaussians along one line: means and deviations apart
    assert clip.frechet(x @ turn, 3*x @ turn) == pytest.approx(clip.frechet(x, 3*x)) and clip.frechet(x, 3*x) == pytest.approx(clip.frechet(3*x, x))
    assert clip.frechet(x, mean.expand(9, -1)) == pytest.approx(spread)                                # a heap that has collapsed to its mean
    g = core.generator(2)
    a, b = (s*torch.randn(200_000, 3, generator=g, dtype=torch.float64) for s in (torch.tensor([1., 2, 3]), torch.tensor([2., 2, 1])))
    assert clip.frechet(a, b) == pytest.approx(1 + 0 + 4, abs=.05)
    few, many = (clip.frechet(torch.randn(k, 64, generator=g), torch.randn(k, 64, generator=g)) for k in (10, 1000))
    assert many < 5 < few                                                                              # of one kind, and yet apart: the fewer, the further
    assert clip.frechet(x.float().half(), x) < 1e-3
    for bad in ((x[:1], x), (x, x[:, :4]), (x[0], x)):
        with pytest.raises(ValueError, match="expected"): clip.frechet(*bad)
