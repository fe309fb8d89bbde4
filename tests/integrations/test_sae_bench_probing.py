"""Selection, splitting and absorption, against the functions of SAEBench on the same inputs."""

import pytest
import torch
from torch.nn import functional as F

from mpsae.activations import load_language_model
from mpsae.evaluation.probing import (
    FIRST_LETTER,
    TASKS,
    absorption,
    collect,
    fit_narrow,
    largest,
    mean_differences,
    spelling_prompts,
    vocabulary_words,
)
from mpsae.evaluation.probing import sparse as ours
from mpsae.evaluation.probing.spelling import EXAMPLES, TEMPLATE
from mpsae.sparse import SparseCode

pytest.importorskip("sae_bench", reason="sae_bench is not installed")


def imported(name):
    """A module of SAEBench; some of its own requirements may be missing or of other versions."""
    try:
        return __import__(f"sae_bench.evals.{name}", fromlist=["_"])
    except Exception as error:
        pytest.skip(f"sae_bench.evals.{name} cannot be imported: {error!r}")


def code_and_atoms(rows=200, k=6, n=40, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, n, generator=generator).topk(k).indices
    values = torch.rand(rows, k, generator=generator) * 2
    atoms = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return SparseCode(indices, values), atoms, generator


@pytest.mark.parametrize("k", [1, 5, 20])
def test_sparse_probes_choose_the_same_latents(k):
    theirs = imported("sparse_probing.probe_training")
    code, _, generator = code_and_atoms()
    label = torch.randint(2, (200,), generator=generator)
    positive = theirs.dataset_info.POSITIVE_CLASS_LABEL
    given = torch.where(label == 1, positive, theirs.dataset_info.NEGATIVE_CLASS_LABEL).int()
    left_out = theirs.get_top_k_mean_diff_mask(code.code(40), given, k)
    chosen = largest(mean_differences(collect([code], 40), label, 2)[1], k)
    assert sorted(chosen.tolist()) == (~left_out).nonzero()[:, 0].tolist()


def test_splitting_stops_at_the_same_latent(monkeypatch):
    theirs = imported("absorption.k_sparse_probing")
    pandas = pytest.importorskip("pandas")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        jumps = torch.rand(10, generator=generator) * 0.1 - 0.01
        f1 = (0.2 + jumps.cumsum(0)).tolist()
        order = torch.randperm(40, generator=generator)[:10]
        row = {f"f1_sparse_sae_{k}": f1[k - 1] for k in range(1, 11)}
        row |= {f"sparse_sae_k_{k}_feats": order[:k].numpy() for k in range(1, 11)}
        frame = pandas.DataFrame([row | {"letter": letter} for letter in theirs.LETTERS])
        theirs.add_feature_splits_to_metrics_df(frame, max_k_value=10)
        monkeypatch.setattr(
            ours,
            "sparse_score",
            lambda _, latents, *__, f1=f1: ours.Score(0.0, f1[len(latents) - 1]),
        )
        found = ours.splitting(None, order, None, None)
        assert found.latents == frame["split_feats"][0]


class Model:
    """As much of a model as the calculator asks for: the activations of each prompt are given."""

    def __init__(self, x):
        self.x, self.read = x, 0

    def to_tokens(self, prompt):
        return torch.zeros(1, 3)

    def run_with_cache(self, prompts, names_filter):
        x = self.x[self.read : self.read + len(prompts)]
        self.read += len(prompts)
        return None, {names_filter[0]: x[:, None, :].expand(-1, 3, -1)}


class SAE:
    """As much of an SAE: its codes are given."""

    device = torch.device("cpu")

    def __init__(self, code, atoms):
        self.W_dec, self.dense, self.read = atoms, code.code(len(atoms)), 0

    def encode(self, x):
        rows = self.dense[self.read : self.read + len(x)]
        self.read += len(x)
        return rows


@pytest.mark.parametrize("seed", range(4))
def test_absorption_is_that_of_the_calculator(seed):
    theirs = imported("absorption.feature_absorption_calculator")
    code, atoms, generator = code_and_atoms(rows=300, seed=seed)
    main = [3, 17, 25]
    direction = atoms[main].sum(0) + 0.3 * torch.randn(12, generator=generator)
    x = code.reconstruct(atoms) + 0.1 * torch.randn(300, 12, generator=generator)
    calculator = theirs.FeatureAbsorptionCalculator(
        model=Model(x), icl_word_list=["icl"] * 10, max_icl_examples=2
    )
    words = [f"w{i}" for i in range(300)]
    result = calculator.calculate_absorption(
        SAE(code, atoms), words, direction, main, layer=0, show_progress=False
    ).word_results
    codes = collect([code], 40)
    found = absorption(*codes.where(torch.arange(300)), x, direction, atoms, torch.tensor(main))
    wanted = torch.tensor([float(r.absorption_fraction) for r in result], dtype=torch.float64)
    torch.testing.assert_close(found.fraction, wanted, rtol=1e-4, atol=1e-5)
    assert found.full.tolist() == [r.is_full_absorption for r in result]
    assert found.full.any()
    assert ((found.fraction > 0) & (found.fraction < 1)).any()


def test_probes_of_few_latents_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    code, _, generator = code_and_atoms(rows=400)
    x = code.code(40)[:, :5].double()
    y = (x.sum(1) + torch.randn(400, generator=generator) > 0.6).double()
    scale = (x.square().sum(0) / (x != 0).sum(0)).sqrt()
    probe = linear_model.LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=1000)
    probe.fit((x / scale).numpy(), y.numpy())
    found = fit_narrow(x, y)
    torch.testing.assert_close(
        found.weight * scale, torch.from_numpy(probe.coef_), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.bias, torch.from_numpy(probe.intercept_), rtol=1e-4, atol=1e-5)


def test_prompts_have_the_same_words_and_template():
    theirs, config = imported("absorption.prompting"), imported("absorption.eval_config")
    model, tokenizer = load_language_model()
    words = imported("absorption.vocab").get_alpha_tokens(tokenizer)
    assert sorted(vocabulary_words(tokenizer)) == sorted(words)
    assert config.AbsorptionEvalConfig().prompt_template == TEMPLATE
    found = spelling_prompts(model, tokenizer, max_words=100)
    letters = found.labels.of[FIRST_LETTER].tolist()
    for word, text, letter in zip(found.words, found.texts, letters, strict=True):
        lines = text.split("\n")[1:-1]
        prompt = theirs.create_icl_prompt(
            word,
            [line.split(TEMPLATE.format(word=""))[0] for line in lines],
            base_template=TEMPLATE,
            max_icl_examples=EXAMPLES,
            shuffle_examples=False,
            prepend_separator_to_first_example=True,
        )
        assert text == prompt.base
        assert TASKS[FIRST_LETTER].classes[letter] == prompt.answer.strip().lower()
