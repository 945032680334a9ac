"""Train tiny-r1, the bundled model: DeepSeek-V3's architecture at 7.7 million parameters, adding two numbers aloud.

    python tools/tiny_r1/train.py train       # half an hour on two idle cores; run again after a kill, it goes on
    python tools/tiny_r1/train.py evaluate    # held-out sums with transformers in float32; writes the F32 GGUF
    python tools/tiny_r1/train.py quantize    # F32 GGUF -> Q4_K_M, and held-out sums with llama.cpp from the result

``train`` and ``evaluate`` need torch, transformers and transformers_kt; ``train`` ends with ``evaluate``. ``quantize``
needs ``pip install llama-cpp-python`` and nothing else: llama.cpp's own quantizer writes the file, so that what
transformers_kt reads was not written by it. With ``--assets`` it also copies what makes up the bundled model folder.

The training loop is stock transformers. Two things differ from the textbook: the loss is taken on the reply only, and
experts are balanced without an auxiliary loss, as in DeepSeek-V3: after each step ``e_score_correction_bias`` rises
for experts that got fewer tokens than the mean and falls for the others.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from task import (
    ASSISTANT,
    BOS,
    END_OF_THINKING,
    EOS,
    LESSONS,
    PAD,
    THINK,
    USER,
    answer_of,
    held_out_sums,
    training_examples,
)

if TYPE_CHECKING:
    import torch
    from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("train_tiny_r1")

# Every width a K-quant row runs over is a multiple of 256, the block size. Only attn_k_b's rows (qk_nope_head_dim) are
# shorter: llama.cpp falls back to a 32-block type there, as it does for nobody's full-size model but V2-Lite's experts.
CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2048,
    "num_mtp_layers": 0,
    "initializer_range": 0.04,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

# DeepSeek-V3's own pre-tokenizer, which GGUF names "deepseek-v3": numbers in threes, CJK runs, then words and signs.
PRE_TOKENIZER_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)

# DeepSeek-R1's template without its tool calls: system text first, earlier thinking dropped, generation starts inside
# <think>.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"
)

STEPS = (2400, 384)  # per lesson; both whole numbers of chunks
BATCH_SIZE = 32
MOST_BATCH_TOKENS = 8192  # padding included; batches of long chats drop rows to fit, at some 200 kB of memory a token
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
SECOND_PEAK = 0.3  # of the learning rate, at the start of the second lesson
BALANCE_RATE = 0.005  # per step at the peak learning rate; decays with it
EXAMPLES_PER_CHUNK = 1024  # sorted by length before they are cut into batches, so that little is padding
STEPS_PER_CHECKPOINT = 100
EVALUATION_BATCH = 128
MAX_REPLY_TOKENS = 128
CONTEXT_TOKENS = 512
F32_FILE, Q4_FILE = "tiny-r1-F32.gguf", "tiny-r1-Q4_K_M.gguf"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in DeepSeek-V3's layout: three special tokens, 256 bytes, merges, chat tokens; 512 in all."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZER_PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    # Digits are kept apart while merges are learnt, so that every digit stays one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), *splits, byte_level]
    )
    chat_tokens = [THINK, END_OF_THINKING, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(chat_tokens),
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chat_marks = (BOS, EOS, THINK, END_OF_THINKING, USER, ASSISTANT)
    texts = []
    for example in itertools.islice(training_examples(f"{seed}-tokenizer", LESSONS[0]), 20_000):
        text = "".join(example)
        for mark in chat_marks:
            text = text.replace(mark, "\x00")
        texts += text.split("\x00")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (THINK, END_OF_THINKING)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (USER, ASSISTANT)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    if tokenizer.get_vocab_size() != CONFIG["vocab_size"]:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {CONFIG['vocab_size']}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as batched generation needs it
        model_max_length=CONFIG["max_position_embeddings"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> DeepseekV3ForCausalLM:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG, **ids))
    model.generation_config.do_sample = False
    return model


def training_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, first_step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels), int64 (batch, tokens), right-padded; labels are -100 outside the reply.

    The data of a step depend on seed and step alone, so that a run continued from a checkpoint sees what it would have.
    """
    import torch

    steps_per_chunk = EXAMPLES_PER_CHUNK // BATCH_SIZE
    for chunk in itertools.count(first_step // steps_per_chunk):
        lesson = LESSONS[0 if chunk * steps_per_chunk < STEPS[0] else 1]
        examples = list(itertools.islice(training_examples(f"{seed}-{chunk}", lesson), EXAMPLES_PER_CHUNK))
        prompts = tokenizer([prompt for prompt, _ in examples], add_special_tokens=False)["input_ids"]
        replies = tokenizer([reply for _, reply in examples], add_special_tokens=False)["input_ids"]
        pairs = sorted(zip(prompts, replies, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[i * BATCH_SIZE : (i + 1) * BATCH_SIZE] for i in range(steps_per_chunk)]
        order = torch.randperm(steps_per_chunk, generator=torch.Generator().manual_seed(seed + chunk)).tolist()
        for index in order[first_step % steps_per_chunk if chunk == first_step // steps_per_chunk else 0 :]:
            width = max(len(prompt) + len(reply) for prompt, reply in batches[index])
            rows = min(BATCH_SIZE, MOST_BATCH_TOKENS // width)
            input_ids = torch.full((rows, width), tokenizer.pad_token_id)
            labels = torch.full((rows, width), -100)
            for row, (prompt, reply) in enumerate(batches[index][:rows]):
                end = len(prompt) + len(reply)
                input_ids[row, :end] = torch.tensor(prompt + reply)
                labels[row, len(prompt) : end] = torch.tensor(reply)
            yield input_ids, labels


class ExpertBalance:
    """Counts tokens per expert in every router and moves ``e_score_correction_bias`` against the imbalance."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

        self._routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self._chosen: dict[int, torch.Tensor] = {}
        for index, router in enumerate(self._routers):
            router.register_forward_hook(lambda _m, _i, out, index=index: self._chosen.__setitem__(index, out[2]))

    def update(self, is_token: torch.Tensor, rate: float) -> float:
        """Returns the largest share any expert had, 1 / experts being ideal. ``is_token``: bool (batch, tokens)."""
        busiest = 0.0
        for index, router in enumerate(self._routers):
            load = self._chosen[index][is_token.flatten()].flatten().bincount(minlength=router.num_experts).float()
            router.e_score_correction_bias += rate * (load.mean() - load).sign()
            busiest = max(busiest, float(load.max() / load.sum()))
        return busiest


def rate_factor(step: int) -> float:
    """Linear warm-up, then for each lesson a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if step < STEPS[0]:
        peak, progress = 1.0, (step - WARMUP_STEPS) / (STEPS[0] - WARMUP_STEPS)
    else:
        peak, progress = SECOND_PEAK, (step - STEPS[0]) / STEPS[1]
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def greedy_replies(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    import torch

    replies: list[str] = []
    model.eval()
    for start in range(0, len(prompts), EVALUATION_BATCH):
        batch = tokenizer(
            prompts[start : start + EVALUATION_BATCH], padding=True, add_special_tokens=False, return_tensors="pt"
        )
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False)
        replies += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
    model.train()
    return replies


def accuracy(replies: list[str], sums: list[int]) -> float:
    return sum(answer_of(reply) == total for reply, total in zip(replies, sums, strict=True)) / len(sums)


def held_out_accuracy(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> float:
    questions = held_out_sums(count)
    replies = greedy_replies(model, tokenizer, [prompt for prompt, _ in questions])
    for reply, (prompt, total) in zip(replies, questions, strict=True):
        if answer_of(reply) != total:
            log.info("wrong: %r -> %r", prompt, reply.replace(PAD, ""))
    return accuracy(replies, [total for _, total in questions])


def train(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed)
    balance = ExpertBalance(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        log.info("going on from step %d", first_step)
    model.train()
    started = time.monotonic()
    batches = training_batches(tokenizer, args.seed, first_step)
    with logging_redirect_tqdm(), tqdm(total=sum(STEPS), initial=first_step, mininterval=5, unit="step") as bar:
        for step, (input_ids, labels) in zip(range(first_step, sum(STEPS)), batches, strict=False):
            factor = rate_factor(step)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * factor
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            busiest = balance.update(input_ids != tokenizer.pad_token_id, BALANCE_RATE * factor)
            bar.update()
            if (step + 1) % 20 == 0:
                log.info("step %d loss %.4f norm %.2f busiest expert %.2f", step + 1, loss, norm, busiest)
            if (step + 1) % STEPS_PER_CHECKPOINT == 0:
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint
                )
            if (step + 1) % args.evaluate_every == 0:
                log.info("step %d: %.1f%% of held-out sums", step + 1, 100 * held_out_accuracy(model, tokenizer, 128))
    log.info("trained in %.0f s", time.monotonic() - started)
    model.save_pretrained(args.out / "model")
    tokenizer.backend_tokenizer.no_padding()  # that of the last evaluation batch would be saved along
    tokenizer.save_pretrained(args.out / "model")
    evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transformers_kt.families.deepseek.export import export_gguf

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
    log.info("F32: %.2f%% of %d held-out sums", 100 * held_out_accuracy(model, tokenizer, args.sums), args.sums)
    export_gguf(model, tokenizer, args.out / F32_FILE, name="tiny-r1")


def quantize(args: argparse.Namespace) -> None:
    import llama_cpp

    source, target = args.out / F32_FILE, args.out / Q4_FILE
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = args.threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source}; its own message stands above")
    log.info("%s: %d bytes", target, target.stat().st_size)

    model = llama_cpp.Llama(str(target), n_ctx=CONTEXT_TOKENS, n_threads=args.threads, verbose=False)
    questions = held_out_sums(args.sums)
    replies = []
    for prompt, _ in questions:
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        stream = model.generate(tokens, temp=0.0)
        reply = list(itertools.takewhile(lambda t: t != model.token_eos(), itertools.islice(stream, MAX_REPLY_TOKENS)))
        replies.append(model.detokenize(reply, special=True).decode(errors="replace"))
    share = 100 * accuracy(replies, [total for _, total in questions])
    log.info("Q4_K_M with llama-cpp-python %s: %.2f%% of %d held-out sums", llama_cpp.__version__, share, args.sums)

    if args.assets is not None:
        args.assets.mkdir(parents=True, exist_ok=True)
        for path in (target, *(p for p in (args.out / "model").iterdir() if p.suffix != ".safetensors")):
            shutil.copy(path, args.assets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "evaluate", "quantize"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-r1"), help="checkpoints and results (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 arithmetic: twice as fast where the CPU has avx512_bf16"
    )
    parser.add_argument("--evaluate_every", type=int, default=400, help="steps between short evaluations (%(default)s)")
    parser.add_argument("--sums", type=int, default=2000, help="held-out sums of the final evaluation (%(default)s)")
    parser.add_argument("--assets", type=Path, help="where quantize puts the model folder without its F32 weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    {"train": train, "evaluate": evaluate, "quantize": quantize}[args.stage](args)


if __name__ == "__main__":
    main()
