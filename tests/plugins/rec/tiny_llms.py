"""Random LLMs of two layers and a table of item texts, as HLLM and PerSRec read them."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import polars as pl

# Folder -> model type. The first two are the items' and the user's, the rest is for other users.
LLMS = {
    "item_llm": "llama",
    "user_llm": "llama",
    "user_mistral": "mistral",
    "user_bert": "bert",
}
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_texts(work: Path, items: Sequence[str]) -> None:
    """``texts/synth.csv`` for HLLM, ``texts_persrec/synth.parquet`` with a row for each number.

    Beside each folder stands a yaml file that names it.

    Args:
        work: the folder to write into.
        items: tokens in the order of the interaction file, as REC numbers them.
    """
    titles = [f"{item} " * (1 + number % 3) for number, item in enumerate(items)]
    for folder in ("texts", "texts_persrec"):
        (work / folder).mkdir()
        (work / f"{folder}.yaml").write_text(f"text_path: {work / folder}\n", encoding="utf-8")
    pl.DataFrame({"item_id": items, "title": titles}).write_csv(work / "texts" / "synth.csv")
    numbers = range(1, len(items) + 1)
    table = pl.DataFrame({"object_id": numbers, "title": titles})
    table.write_parquet(work / "texts_persrec" / "synth.parquet")


def write_llms(work: Path, items: Sequence[str]) -> None:
    """The folders of :data:`LLMS`; config.json alone where transformers is not importable."""
    for folder, kind in LLMS.items():
        (work / folder).mkdir()
        config = json.dumps(SIZES | {"model_type": kind})
        (work / folder / "config.json").write_text(config, encoding="utf-8")
    if find_spec("transformers") is None:
        return
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertModel),
    }
    words = ["[UNK]", "title:", "Compress", *items]
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    known.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=known, unk_token="[UNK]")
    for seed, (folder, kind) in enumerate(LLMS.items()):
        torch.manual_seed(seed)
        config, llm = classes[kind]
        llm(config(**SIZES)).save_pretrained(work / folder)
        tokenizer.save_pretrained(work / folder)
