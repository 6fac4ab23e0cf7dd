"""Train the demo model: ``python -m streamkv.demo.train --minutes 50``.

Two cores and about an hour suffice. The schedule follows the clock, not a step count, so that a slower
machine gets a shorter but complete run: warm up, stay constant, decay over the last third. The run saves
its state every few minutes and goes on from it when started again; started with a changed corpus it goes
on with the new one.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from streamkv.demo import arithmetic, circuit, model_path
from streamkv.demo import tokenizer as vocabulary
from streamkv.demo.corpus import dialogue, dialogues
from streamkv.demo.text import Message, casual

MAX_LENGTH = 4096  # tokens; the context the model is made for
LONG_ONE_IN = 60  # batches; how often a batch is one or two dialogues that fill the context
OTHERS_WEIGHT = 0.1  # of the loss on what the user says: it teaches the words, not the manners
DRILL_ONE_IN = 12  # batches; how often a batch is a copying drill
SUMS_ONE_IN = 2  # batches; how often a batch is nothing but sums: in dialogues two tokens in a hundred are a result's digits
POOL = 512  # dialogues sorted by length before they are cut into batches


@dataclass(frozen=True)
class Settings:
    """The settings of one run; times in seconds."""

    seconds: float
    out: Path
    state: Path
    seed: int
    threads: int
    batch_tokens: int
    save_every: float = 120.0


@dataclass(frozen=True)
class Batch:
    """Dialogues of like length, padded on the right."""

    token_ids: Tensor  # [num_dialogues, length]
    weights: Tensor  # [num_dialogues, length]: of the loss of predicting this token


def model_config() -> LlamaConfig:
    """Return the shape of the model: 5 million weights, grouped heads of 64, a context of 4,096."""
    return LlamaConfig(
        vocab_size=vocabulary.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=vocabulary.PAD_ID,
        bos_token_id=vocabulary.BOS_ID,
        eos_token_id=vocabulary.END_ID,
        attn_implementation="sdpa",
    )


def collate(rows: list[tuple[list[int], list[bool]]]) -> Batch:
    """Pad encoded dialogues to the longest of them."""
    length = min(MAX_LENGTH, max(len(token_ids) for token_ids, _ in rows))
    token_ids = torch.full((len(rows), length), vocabulary.PAD_ID)
    weights = torch.zeros(len(rows), length)
    for row, (ids, own) in enumerate(rows):
        kept = min(len(ids), length)
        token_ids[row, :kept] = torch.tensor(ids[:kept])
        weights[row, :kept] = torch.tensor([1.0 if mine else OTHERS_WEIGHT for mine in own[:kept]])
    return Batch(token_ids, weights)


def batches(tokenizer: Tokenizer, seed: int, batch_tokens: int) -> Iterator[Batch]:
    """Yield batches of about ``batch_tokens`` tokens without end."""
    rng = random.Random(seed)
    source = dialogues(seed)
    while True:
        encoded = [vocabulary.encode(tokenizer, item) for item in islice(source, POOL)]
        encoded.sort(key=lambda row: len(row[0]))
        ready: list[list[tuple[list[int], list[bool]]]] = [[]]
        for row in encoded:
            if ready[-1] and len(row[0]) * (len(ready[-1]) + 1) > batch_tokens:
                ready.append([])
            ready[-1].append(row)
        rng.shuffle(ready)
        for rows in ready:
            if rng.randrange(LONG_ONE_IN) == 0:
                yield collate([_long(tokenizer, rng) for _ in range(max(1, batch_tokens // MAX_LENGTH))])
            yield collate(rows)


def _long(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Return a dialogue that fills the whole context."""
    messages: list[Message] = dialogue(rng, "train", topics=30)
    while True:
        token_ids, own = vocabulary.encode(tokenizer, messages)
        if len(token_ids) >= MAX_LENGTH:
            return token_ids[:MAX_LENGTH], own[:MAX_LENGTH]
        messages += [m for m in dialogue(rng, "train", topics=10) if m["role"] != "system"]


def drill(rng: random.Random, batch_tokens: int, length: int = 128) -> Batch:
    """Return rows of random tokens that repeat themselves.

    In dialogues only one token in ten must be copied from far back (a name, a thing asked for); here
    every token keeps the copying heads (see ``circuit.py``) in practice.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    for _ in range(batch_tokens // length):
        period = rng.randint(6, 50)
        once = [rng.randrange(len(vocabulary.SPECIAL), vocabulary.VOCAB_SIZE) for _ in range(period)]
        repeated = (once * (length // period + 1))[: length - 1]
        rows.append(([vocabulary.BOS_ID, *repeated], [i > period for i in range(length)]))
    return collate(rows)


def sums(tokenizer: Tokenizer, rng: random.Random, batch_tokens: int, length: int = 96) -> Batch:
    """Return rows of sums, each a dialogue of its own."""
    rows: list[tuple[list[int], list[bool]]] = []
    for _ in range(batch_tokens // length):
        messages: list[Message] = []
        token_ids: list[int] = []
        own: list[bool] = []
        while len(token_ids) < length:
            question, answer, _ = arithmetic.ask(rng, "train")
            messages += [{"role": "user", "content": casual(rng, question)}, {"role": "assistant", "content": answer}]
            token_ids, own = vocabulary.encode(tokenizer, messages)
        rows.append((token_ids, own))
    return collate(rows)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the weighted mean loss in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden: Tensor = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
        weights = batch.weights[:, 1:].flatten()
        wanted = weights.nonzero()[:, 0]
        logits: Tensor = model.lm_head(hidden[:, :-1].flatten(0, 1)[wanted])  # [num_wanted, vocab]
    targets = batch.token_ids[:, 1:].flatten()[wanted]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (it needs about half the steps here), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.012, momentum=0.95, weight_decay=0.1)
    embedding = {"params": [model.model.embed_tokens.weight], "lr": 8e-3}
    adam = torch.optim.AdamW([embedding, {"params": norms, "lr": 3e-3}], betas=(0.9, 0.98), weight_decay=0.0)
    for group in (*muon.param_groups, *adam.param_groups):
        group["peak"] = group["lr"]
    return [muon, adam]


def rate(progress: float) -> float:
    """Return the share of the peak learning rate at a share of the run: warm up, stay, decay."""
    if progress < 0.02:
        return 0.05 + 47.5 * progress
    return 1.0 if progress < 0.67 else max(0.0, (1.0 - progress) / 0.33)


@dataclass
class Run:
    """A training run in progress; written by ``train`` alone."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write everything needed to go on, atomically."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counts": {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds},
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.tokens, self.seconds = (state["counts"][key] for key in ("steps", "tokens", "seconds"))


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write the model in bfloat16 with its configuration; the fp32 weights stay as they are."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.bfloat16
    half.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS_ID,
        eos_token_id=vocabulary.END_ID,
        pad_token_id=vocabulary.PAD_ID,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    half.save_pretrained(out)


def train(settings: Settings) -> None:
    """Train until the time is used up; writes the model's folder and the state as it goes."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if not (settings.out / "tokenizer.json").exists():
        vocabulary.build(settings.seed, settings.out)
    tokenizer = Tokenizer.from_file(str(settings.out / "tokenizer.json"))
    model = LlamaForCausalLM(model_config())
    circuit.initialise(model)
    run = Run(model, make_optimizers(model))
    if settings.state.exists():
        run.load(settings.state)
    held_out = [vocabulary.encode(tokenizer, item) for item in islice(dialogues(settings.seed, "heldout"), 48)]
    # A resumed run must not see the same dialogues again.
    source = batches(tokenizer, settings.seed + 1000 * run.steps, settings.batch_tokens)
    rng = random.Random(settings.seed + run.steps)
    saved = time.monotonic()
    print(f"{model.num_parameters():,} parameters, from step {run.steps}", flush=True)
    while run.seconds < settings.seconds:
        started = time.monotonic()
        progress = run.seconds / settings.seconds
        drilled = rng.randrange(DRILL_ONE_IN) == 0
        if drilled:
            batch = drill(rng, settings.batch_tokens)
        elif rng.randrange(SUMS_ONE_IN) == 0:
            batch = sums(tokenizer, rng, settings.batch_tokens)
        else:
            batch = next(source)
        loss = _step(run, batch, rate(progress))
        run.seconds += time.monotonic() - started
        if run.steps % 25 == 0 or (drilled and run.steps % 8 == 0):
            _report(run, loss, settings, drilled)
        if time.monotonic() - saved > settings.save_every:
            _keep(run, settings, held_out)
            saved = time.monotonic()
    _keep(run, settings, held_out)


def _step(run: Run, batch: Batch, share: float) -> float:
    loss = loss_of(run.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad()
    run.steps += 1
    run.tokens += int((batch.weights > 0).sum())
    return float(loss.detach())


def _report(run: Run, loss: float, settings: Settings, drilled: bool) -> None:
    kind = "drill" if drilled else "loss"
    print(
        f"step {run.steps} | {run.tokens / 1e6:.2f}M tokens | {run.seconds / 60:.1f} of {settings.seconds / 60:.0f} min | "
        f"{kind} {loss:.3f} | {run.tokens / run.seconds:.0f} tokens/s",
        flush=True,
    )


def _keep(run: Run, settings: Settings, held_out: list[tuple[list[int], list[bool]]]) -> None:
    """Save the state, export the model, and print the held-out loss on what the model is to write."""
    run.save(settings.state)
    export(run.model, settings.out)
    with torch.no_grad():
        total, count = 0.0, 0
        for row in held_out:
            batch = collate([row])
            own = Batch(batch.token_ids, (batch.weights == 1.0).float())
            number = int(own.weights.sum())
            total, count = total + float(loss_of(run.model, own)) * number, count + number
    print(f"held out: {total / count:.4f} nats per token", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train StreamKV's demo model.")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time in all, resumed runs included")
    parser.add_argument("--out", type=Path, default=model_path(), help="the model's folder")
    parser.add_argument("--state", type=Path, default=Path("demo-training.pt"), help="where the run keeps its state")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=3072)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train(Settings(given.minutes * 60, given.out, given.state, given.seed, given.threads, given.batch_tokens))


if __name__ == "__main__":
    main()
