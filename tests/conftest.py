import json
import os
import signal

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # `make test-gpu` asks for torch, triton, numpy and pytest only
    pass
else:
    settings.register_profile(
        "suite",
        deadline=None,
        derandomize=True,
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("suite")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell lets what it starts in the background ignore Ctrl-C, and tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tensors of the tests are too small to share out
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton reads it once, when it is first imported, by whichever test or library of the process
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton wherever that is installed


def pytest_addoption(parser):
    parser.addoption(
        "--write-snapshot", action="store_true", help="write tests/snapshots in place of comparing"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A local text of some thousand words."""
    import argparse
    import inspect

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(inspect.getsource(argparse))
    return path


def tiny_tokenizer(text, **special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, text_file):
    """Folders of tiny transformers models of several types, and hookpoints that each has."""
    import transformers as tf

    end = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    masked = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    kinds = {
        "llama": (
            tf.LlamaForCausalLM,
            tf.LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=320,
            ),
            end, ["layers.1", "layers.0.mlp", "layers.1.mlp:input"],
        ),
        "gpt2": (
            tf.GPT2LMHeadModel,
            tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=320, n_positions=64),
            {"bos_token": "<e>", "eos_token": "<e>"}, ["h.0", "h.1.mlp"],
        ),
        "gemma2": (
            tf.Gemma2ForCausalLM,
            tf.Gemma2Config(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, vocab_size=320,
            ),
            end, ["layers.0"],
        ),
        "bert": (
            tf.BertModel,
            tf.BertConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                vocab_size=320,
            ),
            masked, ["encoder.layer.0"],
        ),
    }  # fmt: skip
    folders = {}
    for name, (cls, config, special, hookpoints) in kinds.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models") / name
        cls(config).save_pretrained(folder)
        tiny_tokenizer(text_file.read_text(), **special).save_pretrained(folder)
        folders[name] = (folder, hookpoints)
    return folders


@pytest.fixture
def read_json():
    return lambda path: json.loads(path.read_text())


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[2, 4], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """Processes of a gloo group, see :class:`sharded_ranks.Ranks`."""
    from sharded_ranks import Ranks

    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()
