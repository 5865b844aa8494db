"""The same networks and steps in idiomatic PyTorch, with our parameters, as a yardstick.

It uses PyTorch's own attention, convolutions in channels_last, fused AdamW and, on GPUs, bfloat16
autocast. `serve` answers the requests of `benchmarks.run` in a separate process, so that the
threads of the two libraries do not compete.
"""

import contextlib
import copy
import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from benchmarks.timing import calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str) -> tuple[dict, dict]:
    """Arrays of an `.npz` whose names are paths: trees of parameters as tensors, and the rest."""
    tree, rest = {}, {}
    with np.load(path) as file:
        for name in file.files:
            top, *inner = name.split("/")
            if not inner:
                rest[top] = file[name]
                continue
            node = tree.setdefault(top, {})
            for part in inner[:-1]:
                node = node.setdefault(part, {})
            node[inner[-1]] = file[name]
    return {name: _convert(node) for name, node in tree.items()}, rest


def _convert(node, name=""):
    """Stacked layers to a list, kernels `[..., in, out]` to PyTorch's `[out, in, ...]`."""
    if isinstance(node, dict):
        if name == "layers":
            return [_convert(layer) for layer in _unstack(node["block"])]
        if "kernel" in node:
            kernel, bias = node["kernel"], node.get("bias")
            if kernel.ndim == 4:
                kernel = kernel.transpose(3, 2, 0, 1)
            elif name == "out" and kernel.ndim == 3:
                kernel = kernel.reshape(-1, kernel.shape[-1]).T
            else:
                kernel = kernel.reshape(len(kernel), -1).T
            node = {"kernel": kernel} | ({} if bias is None else {"bias": bias.reshape(-1)})
        return {key: _convert(value, key) for key, value in node.items()}
    tensor = torch.tensor(np.ascontiguousarray(node), device=DEVICE)
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _unstack(node):
    def take(node, i):
        return {k: take(v, i) for k, v in node.items()} if isinstance(node, dict) else node[i]

    return [take(node, i) for i in range(len(next(_leaves(node))))]


def _leaves(node):
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _leaves(value)
    else:
        yield node


def linear(x, p):
    return F.linear(x, p["kernel"], p.get("bias"))


def conv(x, p, stride=1, padding=None):
    padding = p["kernel"].shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, p["kernel"], p.get("bias"), stride, padding)


def layer_norm(x, p, epsilon=1e-5):
    return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], epsilon)


def attention(p, q, k, v, heads, **kwargs):
    q, k, v = (
        linear(x, p[name]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, name in ((q, "query"), (k, "key"), (v, "value"))
    )
    y = F.scaled_dot_product_attention(q, k, v, **kwargs)
    return linear(y.transpose(1, 2).flatten(2), p["out"])


def block(p, x, heads, memory=None, positions=0, memory_positions=0, epsilon=1e-5):
    y = layer_norm(x, p["norm_self"], epsilon)
    q = y + positions
    x = x + attention(p["self_attention"], q, q, y, heads) * p.get("scale_self", 1)
    if memory is not None:
        q = layer_norm(x, p["norm_cross"], epsilon) + positions
        k = memory + memory_positions
        x = x + attention(p["cross_attention"], q, k, memory, heads)
    y = F.gelu(linear(layer_norm(x, p["norm_mlp"], epsilon), p["mlp_in"]))
    return x + linear(y, p["mlp_out"]) * p.get("scale_mlp", 1)


def norm(x, p):
    groups = math.gcd(32, max(x.shape[1] // 4, 1))
    return F.group_norm(x, groups, p.get("scale"), p.get("bias"), 1e-6)


def residual(p, x):
    y = conv(F.silu(norm(x, p["norm1"])), p["conv1"])
    y = conv(F.silu(norm(y, p["norm2"])), p["conv2"])
    return y + (conv(x, p["shortcut"]) if "shortcut" in p else x)


def cnn_encode(p, x, c):
    x = conv(x, p["conv_in"])
    levels = len(c["channel_multipliers"])
    for level in range(levels):
        for i in range(c["residual_blocks"]):
            x = residual(p[f"level{level}_block{i}"], x)
        if level < levels - 1:
            x = conv(F.pad(x, (0, 1, 0, 1)), p[f"level{level}_down"], 2, 0)
    for i in range(2):
        x = residual(p[f"mid_block{i}"], x)
    return conv(F.silu(norm(x, p["norm_out"])), p["conv_out"])


def cnn_decode(p, style, c):
    x = conv(style, p["conv_in"])
    for i in range(2):
        x = residual(p[f"mid_block{i}"], x)
    flat = style.flatten(2)
    deviation, mean = (flat.var(2) + 1e-6).sqrt(), flat.mean(2)
    for level in reversed(range(len(c["channel_multipliers"]))):
        a = p[f"level{level}_adaptive"]
        gain, bias = linear(deviation, a["gain"]), linear(mean, a["bias"])
        x = norm(x, {}) * gain[:, :, None, None] + bias[:, :, None, None]
        for i in range(c["residual_blocks"] + 1):
            x = residual(p[f"level{level}_block{i}"], x)
        if level > 0:
            x = conv(x, p[f"level{level}_up"])
            b, _, h, w = x.shape  # DCR: channels are (row, column, channel)
            x = x.view(b, 2, 2, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, -1, 2 * h, 2 * w)
            x = x.contiguous(memory_format=torch.channels_last)
    return conv(F.silu(norm(x, p["norm_out"])), p["conv_out"])


def pool_queries(grid, count):
    """Averages of 1, 1, 2, 4, ... blocks of `[B, C, H, W]`, to `[B, count, C]`."""
    groups = []
    for group in range(count.bit_length()):
        level = max(group - 1, 0)
        size = (2 ** (level // 2), 2 ** ((level + 1) // 2))
        groups.append(F.adaptive_avg_pool2d(grid, size).flatten(2).transpose(1, 2))
    return torch.cat(groups, 1)


def latents(p, images, c):
    features = cnn_encode(p["cnn_encoder"], images, c)
    e = p["encoder"]
    x = linear(layer_norm(features.flatten(2).transpose(1, 2), e["norm_in"]), e["embed"])
    grid = x.transpose(1, 2).unflatten(2, features.shape[2:])
    q = linear(pool_queries(grid, c["latents"]), e["query"])
    for layer in e["layers"]:
        q = block(layer, q, c["encoder"]["heads"], x, e["latent_positions"], e["grid_positions"])
    q = linear(layer_norm(q, e["norm_out"]), p["encoder_out"])
    return F.normalize(linear(q, p["quant_conv"]).float(), dim=-1)


def distances(z, codebook):
    z = z.flatten(0, 1)
    return (z**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * z @ codebook.T


def encode(p, images, c):
    z, codebook = latents(p, images, c), F.normalize(p["codebook"], dim=-1)
    return distances(z, codebook).argmin(1).unflatten(0, z.shape[:2])


def decode_grid(p, quantized, c):
    d, side = p["decoder"], c["image_size"] // 2 ** (len(c["channel_multipliers"]) - 1)
    x = linear(quantized, p["post_quant_conv"])
    x = linear(layer_norm(x, d["norm_in"]), d["embed"])
    q, tapped = x[:, :1].expand(-1, side**2, -1), None
    for i, layer in enumerate(d["layers"], start=1):
        q = block(layer, q, c["decoder"]["heads"], x, d["grid_positions"], d["latent_positions"])
        tapped = q if i == c["semantic_layer"] else tapped
    q = layer_norm(q, d["norm_out"]).transpose(1, 2).unflatten(2, (side, side))
    return conv(q.contiguous(memory_format=torch.channels_last), p["decoder_out"]), tapped


def decode(p, codes, c):
    quantized = F.normalize(p["codebook"], dim=-1)[codes]
    return cnn_decode(p["cnn_decoder"], decode_grid(p, quantized, c)[0], c)


def teacher(p, images, heads):
    """DINOv2's patch tokens."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = F.interpolate(((images + 1) / 2 - mean) / std, (224, 224), mode="bicubic")
    x = F.conv2d(x, p["patch_embed"]["kernel"], p["patch_embed"]["bias"], 14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["class_token"].expand(len(x), -1, -1), x], 1) + p["positions"]
    for layer in p["layers"]:
        x = block(layer, x, heads, epsilon=1e-6)
    return layer_norm(x, p["norm"], 1e-6)[:, 1:]


def lpips_features(p, images):
    shift, scale = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )
    x, features = (images - shift) / scale, []
    for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
        x = F.max_pool2d(x, 2) if stage > 1 else x
        for i in range(1, count + 1):
            x = F.relu(conv(x, p["vgg"][f"conv{stage}_{i}"]))
        features.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
    return features


def lpips(p, real, fake):
    pairs = zip(real, lpips_features(p, fake), strict=True)
    return sum(
        torch.einsum("bchw,c->b", (a - b) ** 2, p[f"lin{i}"]) / a[0, 0].numel()
        for i, (a, b) in enumerate(pairs)
    ).mean()


def patchgan(p, x, channels):
    for i in range(len(channels)):
        x = conv(x, p[f"conv{i}"], 1 if i == len(channels) - 1 else 2, 1)
        if i > 0:
            scale, bias = p[f"norm{i}"]["scale"], p[f"norm{i}"]["bias"]
            x = F.batch_norm(x, None, None, scale, bias, training=True)
        x = F.leaky_relu(x, 0.2)
    return conv(x, p["conv_out"], 1, 1)


class Optimizer:
    """Clipping, AdamW, and a moving average of the weights."""

    def __init__(self, params, average, clip, weight_decay):
        self.leaves = [leaf.requires_grad_() for leaf in _leaves(params)]
        self.adamw = torch.optim.AdamW(
            self.leaves, 1e-4, (0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        self.average = [leaf.detach().clone() for leaf in self.leaves] if average else []
        self.clip = clip

    def step(self):
        nn.utils.clip_grad_norm_(self.leaves, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        if self.average:
            torch._foreach_lerp_(self.average, [x.detach() for x in self.leaves], 1e-4)


class TokenizerStep:
    """A training step with all losses of the default objective."""

    def __init__(self, trees, rest, c):
        self.p, self.teacher, self.lpips = trees["params"], trees["teacher"], trees["lpips"]
        self.discriminator, self.c = trees["discriminator"], c
        self.images = images(rest["image"])
        self.optimizer = Optimizer(self.p, True, 10.0, 1e-4)
        self.discriminator_optimizer = Optimizer(self.discriminator, False, 10.0, 1e-4)

    def loss(self):
        """The weighted sum of the terms, and the reconstruction."""
        c, p, x = self.c, self.p, self.images
        with torch.no_grad():
            target = teacher(self.teacher, x, c["teacher_heads"])
            real = lpips_features(self.lpips, x)
        z, codebook = latents(p, x, c), F.normalize(p["codebook"], dim=-1)
        d = distances(z, codebook)
        q = codebook[d.argmin(1)].unflatten(0, z.shape[:2])
        log_p = F.log_softmax(-d / 0.01, 1)
        probabilities = log_p.exp()
        mean = probabilities.mean(0)
        entropy = -(probabilities * log_p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
        quantization = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        grid, tapped = decode_grid(p, z + (q - z).detach(), c)
        fake = cnn_decode(p["cnn_decoder"], grid, c).float()
        h = F.silu(linear(F.silu(linear(tapped, p["projector"]["in"])), p["projector"]["hidden"]))
        semantic = F.cosine_similarity(linear(h, p["projector"]["out"]), target, dim=-1).mean()
        total = F.mse_loss(fake, x) + lpips(self.lpips, real, fake) + quantization
        total = total + c["entropy"] * entropy - 0.5 * semantic
        if c["adversarial"]:
            total = total - 0.5 * patchgan(self.discriminator, fake, c["channels"]).mean()
        return total, fake

    def __call__(self):
        with autocast():
            total, fake = self.loss()
        total.backward()
        self.optimizer.step()
        if self.c["adversarial"]:
            self.discriminator_optimizer.adamw.zero_grad()
            with autocast():
                real = patchgan(self.discriminator, self.images, self.c["channels"])
                false = patchgan(self.discriminator, fake.detach(), self.c["channels"])
                loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean())
            (0.5 * loss).backward()
            self.discriminator_optimizer.step()
        return total.detach()


def rms_norm(x, p):
    return F.rms_norm(x, x.shape[-1:], p["scale"], 1e-5)


def pack(layer):
    """A generator's layer with fused queries, keys and values, and a fused MLP input."""
    a = layer["attention"]
    return {
        **{name: layer[name] for name in ("norm_attention", "norm_mlp", "mlp_out")},
        "qkv": {"kernel": torch.cat([a[n]["kernel"] for n in ("query", "key", "value")])},
        "out": a["out"],
        "mlp": {"kernel": torch.cat([layer[n]["kernel"] for n in ("mlp_gate", "mlp_in")])},
    }


def generator_block(p, x, heads, dropout, attend):
    qkv = linear(rms_norm(x, p["norm_attention"]), p["qkv"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = attend(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.dropout(linear(y, p["out"]), dropout, dropout > 0)
    gate, up = linear(rms_norm(x, p["norm_mlp"]), p["mlp"]).chunk(2, -1)
    return x + F.dropout(linear(F.silu(gate) * up, p["mlp_out"]), dropout, dropout > 0)


def generator_logits(p, codes, classes, c, dropout=0.0):
    x = torch.cat([p["class_embedding"][classes][:, None], p["embedding"][codes]], 1)
    x = F.dropout(x + p["positions"][: x.shape[1]], dropout, dropout > 0)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for layer in p["layers"]:
        x = generator_block(layer, x, c["heads"], dropout, attend)
    return linear(rms_norm(x, p["norm_out"]), p["head"])


class GeneratorStep:
    """A training step of the generator."""

    def __init__(self, trees, rest, c):
        self.p, self.c = trees["params"], c
        self.p["layers"] = [pack(layer) for layer in self.p["layers"]]
        self.codes = torch.tensor(rest["codes"], dtype=torch.long, device=DEVICE)
        self.labels = torch.tensor(rest["label"], dtype=torch.long, device=DEVICE)
        self.optimizer = Optimizer(self.p, False, 1.0, 0.05)

    def loss(self):
        hidden = torch.rand(len(self.labels), device=DEVICE) < self.c["class_dropout"]
        classes = self.labels.masked_fill(hidden, self.c["classes"])
        logits = generator_logits(self.p, self.codes[:, :-1], classes, self.c, self.c["dropout"])
        return F.cross_entropy(logits.flatten(0, 1).float(), self.codes.flatten())

    def __call__(self):
        with autocast():
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Sample:
    """Sampling all codes of a batch of images, with a cache of keys and values."""

    def __init__(self, trees, rest, c):
        self.p, self.c = trees["params"], c
        self.p["layers"] = [pack(layer) for layer in self.p["layers"]]
        self.labels = torch.tensor(rest["label"], dtype=torch.long, device=DEVICE)

    def step(self, x, position, caches):
        for layer, (keys, values) in zip(self.p["layers"], caches, strict=True):

            def attend(q, k, v, keys=keys, values=values):
                keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
                seen = slice(0, position + 1)
                return F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])

            x = generator_block(layer, x, self.c["heads"], 0.0, attend)
        return linear(rms_norm(x, self.p["norm_out"]), self.p["head"])[:, 0].float()

    @torch.inference_mode()
    def __call__(self, draw=lambda logits: torch.multinomial(logits.softmax(-1), 1)[:, 0]):
        p, c, guided = self.p, self.c, self.c["guidance"] != 1
        rows = self.labels
        if guided:
            rows = torch.cat([rows, torch.full_like(rows, c["classes"])])
        shape = (len(rows), c["heads"], c["codes"], c["width"] // c["heads"])
        with autocast():
            kind = linear(torch.zeros(1, c["width"], device=DEVICE), p["head"]).dtype
            caches = [
                tuple(torch.zeros(shape, dtype=kind, device=DEVICE) for _ in range(2))
                for _ in p["layers"]
            ]
            x, codes = p["class_embedding"][rows][:, None], []
            for position in range(c["codes"]):
                logits = self.step(x + p["positions"][position], position, caches)
                if guided:
                    conditional, free = logits.chunk(2)
                    logits = free + c["guidance"] * (conditional - free)
                codes.append(draw(logits))
                x = p["embedding"][codes[-1].repeat(2 if guided else 1)][:, None]
        return torch.stack(codes, 1)


class Encode:
    def __init__(self, trees, rest, c):
        self.p, self.images, self.c = trees["params"], images(rest["image"]), c

    def run(self):
        return encode(self.p, self.images, self.c)

    @torch.inference_mode()
    def __call__(self):
        with autocast():
            return self.run()


class Decode:
    def __init__(self, trees, rest, c):
        self.p, self.c = trees["params"], c
        self.codes = torch.tensor(rest["codes"], dtype=torch.long, device=DEVICE)

    def run(self):
        return decode(self.p, self.codes, self.c).float()

    @torch.inference_mode()
    def __call__(self):
        with autocast():
            return self.run()


def images(array):
    x = torch.tensor(array, device=DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def autocast():
    if DEVICE == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, torch.bfloat16)


TASKS = {
    "encode": Encode,
    "decode": Decode,
    "tokenizer_step": TokenizerStep,
    "generator_step": GeneratorStep,
    "sample": Sample,
}


def check(job, task: str) -> np.ndarray:
    """The result to compare: codes, images, the loss before an update, or arg-max codes."""
    if task == "generator_step":
        job = copy.copy(job)
        job.c = job.c | {"dropout": 0.0, "class_dropout": 0.0}
    if task.endswith("_step"):
        with autocast():
            loss = job.loss()
        return (loss[0] if isinstance(loss, tuple) else loss).detach().cpu().numpy()
    result = job(lambda logits: logits.argmax(-1)) if task == "sample" else job()
    return result.cpu().numpy()


def seconds_of(job, count: int = 1) -> float:
    """Seconds per call of `count` queued calls."""
    start = time.perf_counter()
    for _ in range(count):
        job()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def serve() -> None:
    """Answers requests, one JSON object per line, until the input ends."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = True
    job = None
    for line in sys.stdin:
        request = json.loads(line)
        if "task" in request:
            trees, rest = load(request["path"])
            job = TASKS[request["task"]](trees, rest, request["config"])
            np.save(request["result"], check(job, request["task"]))
            if DEVICE == "cuda":
                for name in ("run", "loss"):
                    if hasattr(job, name):
                        setattr(job, name, torch.compile(getattr(job, name)))
                job()  # compiles
                torch.cuda.empty_cache()  # for the other process
            answer = {"device": DEVICE, "version": torch.__version__}
        else:
            answer = {"seconds": seconds_of(job, calls(seconds_of(job), DEVICE))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
