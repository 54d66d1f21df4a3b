"""The bundled base is the released one, knows every word, and knows nothing of the demo's languages."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmira.bundled import MODEL_PATH
from fedmira.bundled.languages import TARGET_COUNT, make_tasks, pretraining_languages, prompt_of, source_words
from fedmira.bundled.pretrain import pretrain, record_hashes


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()


@pytest.fixture(scope="module")
def asked():
    return [row for row in make_tasks(0) if row["split"] == "test"]


def greedy_answers(model, tokenizer, prompts: list[str]) -> list[list[str]]:
    """Three greedy words for each prompt; all prompts have the same length."""
    tokens = torch.tensor(tokenizer(prompts)["input_ids"])
    for _ in range(3):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    return [tokenizer.convert_ids_to_tokens(answer) for answer in tokens[:, -3:].tolist()]


def word_accuracy(answers: list[list[str]], wanted: list[str]) -> float:
    right = [
        a == b for answer, line in zip(answers, wanted, strict=True) for a, b in zip(answer, line.split(), strict=True)
    ]
    return sum(right) / len(right)


def test_the_recorded_hashes_are_those_of_the_files():
    assert json.loads((MODEL_PATH / "sha256.json").read_text()) == record_hashes(MODEL_PATH)


def test_a_hash_is_the_sha256_of_the_file():
    weights = (MODEL_PATH / "model.safetensors").read_bytes()
    assert record_hashes(MODEL_PATH)["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_the_model_folder_is_below_eight_megabytes():
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) < 8e6


def test_every_word_is_a_single_token(tokenizer):
    rows = make_tasks(0)
    words = {word for row in rows for word in (row["prompt"] + " " + row["completion"]).split()}
    ids = tokenizer(sorted(words))["input_ids"]
    assert all(len(piece) == 1 and piece[0] != tokenizer.unk_token_id for piece in ids)


def test_decoding_gives_the_answer_back(tokenizer, asked):
    answer = asked[0]["completion"]
    assert tokenizer.decode(tokenizer(answer)["input_ids"]) == answer


def test_the_tokenizer_adds_no_token(tokenizer, asked):
    assert len(tokenizer(asked[0]["prompt"])["input_ids"]) == 5


def test_a_word_of_no_language_is_unknown_and_not_lost(tokenizer):
    assert tokenizer("translate hello :")["input_ids"][1] == tokenizer.unk_token_id


def test_the_model_and_tokenizer_agree_on_special_tokens(model, tokenizer):
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_the_base_translates_a_language_of_its_pretraining(model, tokenizer):
    words, language = source_words(), pretraining_languages(64)[7]
    prompts = [prompt_of(words[i : i + 3]).replace("translate", "<lang07>") for i in range(0, 48, 3)]
    wanted = [" ".join(language[word] for word in words[i : i + 3]) for i in range(0, 48, 3)]
    assert word_accuracy(greedy_answers(model, tokenizer, prompts), wanted) > 0.95


def test_the_base_answers_the_demo_like_a_random_guess(model, tokenizer, asked):
    answers = greedy_answers(model, tokenizer, [row["prompt"] for row in asked])
    # One guess per source word and client: 768 of probability 1/96, so four standard errors are .0147.
    assert word_accuracy(answers, [row["completion"] for row in asked]) < 1 / TARGET_COUNT + 0.0147


def test_pretraining_twice_gives_the_same_bits():
    first, second = (pretrain(3, report=lambda line: None)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_pretraining_lowers_the_loss_and_reports_the_final_one():
    told: list[str] = []
    pretrain(40, report=told.append)
    assert told[-1].startswith("final pretraining loss: ")
    # Untrained, the loss is ln 213 = 5.4 nats or more.
    assert float(told[-1].split()[3]) < 4.6


@pytest.mark.slow
def test_the_whole_pretraining_reaches_the_released_losses():
    told: list[str] = []
    pretrain(report=told.append)
    tagged, untagged = (float(told[-1].split()[i]) for i in (3, -2))
    assert tagged < 0.05
    # Hedging three words over 64 lexicons costs at most 3 ln 64 / 4 = 3.12 nats a token.
    assert untagged < 3.12
