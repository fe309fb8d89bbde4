"""Pursuits with a fit in each step, against loops written from their definitions in fp64."""

import pytest
import torch

from mpsae import gradient_pursuit, orthogonal_matching_pursuit
from mpsae.fits import GradientStep, LeastSquares, NonNegative
from mpsae.kernels import cpu_extension, cpu_orthogonal
from mpsae.reference import DenseCorrelations, PursuitOptions, pursue

needs_kernel = pytest.mark.skipif(
    not cpu_extension.available(), reason=cpu_extension.unavailable_reason()
)
FORMS = ["omp", "non-negative omp", "gradient pursuit", "signed gradient pursuit"]


def problem(B=24, d=18, n=60, coherence=0.0, seed=0, dtype=torch.float64):
    """Rows and atoms of any norm; coherence adds a direction that all of them share."""
    g = torch.Generator().manual_seed(seed)
    common = coherence * torch.randn(d, generator=g, dtype=torch.float64)
    x = torch.randn(B, d, generator=g, dtype=torch.float64) + 2 * common
    atoms = torch.randn(n, d, generator=g, dtype=torch.float64) + common
    norms = 0.7 + 0.6 * torch.rand(n, 1, generator=g, dtype=torch.float64)
    return x.to(dtype), (norms * torch.nn.functional.normalize(atoms, dim=1)).to(dtype)


def run(form, x, dictionary, k, **options):
    if form.endswith("gradient pursuit"):
        signed = {"nonnegative": False, "select": "abs"} if form.startswith("signed") else {}
        return gradient_pursuit(x, dictionary, k, **{**signed, **options})
    return orthogonal_matching_pursuit(
        x, dictionary, k, nonnegative=form.startswith("non"), **options
    )


def least_squares(x, atoms):
    return torch.linalg.lstsq(atoms.T, x[:, None], driver="gelsd").solution[:, 0]


def nonnegative_least_squares(x, atoms):
    """Try every set of atoms in use: the best of those whose least squares are positive."""
    best, found = x.square().sum(), x.new_zeros(len(atoms))
    for mask in range(1, 2 ** len(atoms)):
        used = [i for i in range(len(atoms)) if mask >> i & 1]
        values = least_squares(x, atoms[used])
        error = (x - values @ atoms[used]).square().sum()
        if (values > 0).all() and error < best:
            best, found = error, x.new_zeros(len(atoms))
            found[used] = values
    return found


def plain_loop(form, x, dictionary, k):
    """One row: its atoms in order and the dense code, by the definition."""
    code, order, residual = dictionary.new_zeros(len(dictionary)), [], x
    signed = form in ("omp", "signed gradient pursuit")
    for _ in range(k):
        correlation = dictionary @ residual
        score = correlation.abs() if signed else correlation.clone()
        if "gradient" not in form:
            score[order] = -torch.inf
        best = int(score.argmax())
        if form != "gradient pursuit" and score[best] <= 0:
            break
        order.append(best)
        support = sorted(set(order))
        atoms = dictionary[support]
        if form == "omp":
            code[support] = least_squares(x, atoms)
        elif form == "non-negative omp":
            code[support] = nonnegative_least_squares(x, atoms)
        else:
            direction = atoms @ residual
            along = direction @ atoms
            code[support] += (along @ residual) / (along @ along) * direction
            if not form.startswith("signed"):
                code.clamp_(min=0)
        residual = x - code @ dictionary
    return order, code


@pytest.mark.parametrize("coherence", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_codes_are_those_of_the_plain_loop(form, coherence):
    x, dictionary = problem(coherence=coherence)
    k = 6
    p = run(form, x, dictionary, k)
    for row in range(len(x)):
        order, code = plain_loop(form, x[row], dictionary, k)
        taken = p.indices[row, : p.steps[row]].tolist()
        assert taken == order
        assert (p.code(len(dictionary))[row] - code).abs().max() <= 1e-9
    assert (p.residual + p.reconstruct(dictionary) - x).abs().max() <= 1e-12
    if form == "non-negative omp" and coherence:
        used = torch.arange(k) < p.steps[:, None]
        assert (used & (p.values == 0)).any(), "no value became 0: the problem is too easy"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coherence", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_those_of_the_loop_under_autograd(form, coherence, dtype):
    x, dictionary = problem(coherence=coherence, dtype=dtype)
    x, dictionary = x.requires_grad_(), dictionary.requires_grad_()
    k, nonnegative = 7, form in ("non-negative omp", "gradient pursuit")
    gradient = "gradient" in form
    select = "max" if form == "gradient pursuit" else "relu" if nonnegative else "abs"
    options = PursuitOptions(k=k, select=select, allow_repeats=gradient)
    if gradient:
        fit = GradientStep(x, dictionary, nonnegative)
    else:
        fit = (NonNegative if nonnegative else LeastSquares)(x, dictionary)
    source = DenseCorrelations(dictionary, None)
    expected = pursue(x, dictionary, None, None, options, source, fit=fit)
    p = run(form, x, dictionary, k)
    assert torch.equal(p.indices, expected.indices)
    weights = torch.linspace(-1, 1, p.values.numel(), dtype=dtype).reshape(p.values.shape)
    for found in (p, expected):
        loss = (found.values * weights).sum() + found.residual.sin().sum()
        found_grads = torch.autograd.grad(loss, (x, dictionary))
        if found is p:
            grads = found_grads
    for ours, theirs in zip(grads, found_grads, strict=True):
        close = 1e-10 if dtype == torch.float64 else 1e-4
        assert (ours - theirs).norm() <= close * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form):
    x, dictionary = problem(B=3, d=6, n=10, coherence=0.3)

    def outputs(x, dictionary):
        p = run(form, x, dictionary, 4)
        return p.values, p.residual

    inputs = (x.requires_grad_(), dictionary.requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_detached_values_are_constants(form):
    x, dictionary = problem()
    x, dictionary = x.requires_grad_(), dictionary.requires_grad_()
    p = run(form, x, dictionary, 4, detach_values=True)
    assert not p.values.requires_grad
    grad_x, grad_dictionary = torch.autograd.grad(p.residual.sum(), (x, dictionary))
    assert torch.equal(grad_x, torch.ones_like(x))
    expected = torch.zeros_like(dictionary).index_add(
        0, p.indices.flatten(), -p.values.reshape(-1, 1).expand(-1, x.shape[1])
    )
    assert (grad_dictionary - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_k_rows_give_each_row_its_own_steps(form):
    x, dictionary = problem(B=5)
    k = torch.tensor([3, 0, 5, 1, 2])
    p = run(form, x, dictionary, k)
    assert torch.equal(p.steps, k)
    for row in range(5):
        s = int(k[row])
        assert not p.indices[row, s:].any()
        assert not p.values[row, s:].any()
        if s:
            alone = run(form, x[row], dictionary, s)
            assert torch.equal(alone.indices, p.indices[row, :s])
            assert (alone.values - p.values[row, :s]).abs().max() <= 1e-12


def test_least_squares_leave_a_residual_orthogonal_to_all_chosen():
    x, dictionary = problem()
    p = orthogonal_matching_pursuit(x, dictionary, 9)
    onto = (dictionary[p.indices] @ p.residual[:, :, None]).abs().max()
    assert onto <= 1e-12
    assert all(len(set(row)) == 9 for row in p.indices.tolist())


@pytest.mark.parametrize("coherence", [0.0, 1.0, 3.0])
def test_the_non_negative_fit_meets_its_optimality_conditions(coherence):
    x, dictionary = problem(B=64, d=24, n=96, coherence=coherence)
    p = orthogonal_matching_pursuit(x, dictionary, 14, nonnegative=True)
    taken = torch.arange(14) < p.steps[:, None]
    slope = (dictionary[p.indices] @ p.residual[:, :, None])[:, :, 0]
    assert (p.values >= 0).all()
    assert slope[taken & (p.values > 0)].abs().max() <= 1e-9
    assert (slope[taken & (p.values == 0)] <= 1e-9).all()


@pytest.mark.parametrize("nonnegative", [False, True])
def test_a_row_stops_at_a_dependent_atom(nonnegative):
    atom = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    dictionary = torch.stack([atom, 2 * atom, atom])
    x = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    options = {"correlation_threshold": -torch.inf} if nonnegative else {}
    p = orthogonal_matching_pursuit(x, dictionary, 3, nonnegative=nonnegative, **options)
    assert p.steps.tolist() == [1]
    assert p.indices.tolist() == [[1, 0, 0]]


def test_a_full_basis_leaves_nothing_and_more_steps_change_nothing():
    x, dictionary = problem(B=6, d=5, n=5)
    p = orthogonal_matching_pursuit(x, dictionary, 12)
    assert p.residual.abs().max() <= 1e-9
    assert (p.steps <= 5).all()


@pytest.mark.parametrize("form", FORMS)
def test_thresholds_stop_rows(form):
    x, dictionary = problem()
    limit = 0.6 * float(x.norm(dim=1).mean())
    p = run(form, x, dictionary, 10, residual_threshold=limit)
    full = run(form, x, dictionary, 10)
    for row in range(len(x)):
        s = int(p.steps[row])
        assert torch.equal(p.indices[row, :s], full.indices[row, :s])
        assert s == full.steps[row] or p.residual[row].norm() < limit
        if s > 1:
            assert run(form, x[row], dictionary, s - 1).residual.norm() >= limit
    assert len(set(p.steps.tolist())) > 1
    none = run(form, x, dictionary, 10, correlation_threshold=1e9)
    assert not none.steps.any()
    assert torch.equal(none.residual, x)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_dtypes_and_empty_rows(form):
    x, dictionary = problem(B=6)
    flat = run(form, x, dictionary, 3)
    nested = run(form, x.reshape(2, 3, -1), dictionary, 3)
    assert nested.values.shape == (2, 3, 3)
    assert nested.steps.shape == (2, 3)
    assert torch.equal(nested.indices.reshape(6, 3), flat.indices)
    empty = run(form, x[:0], dictionary, 3)
    assert empty.values.shape == (0, 3)
    zero = run(form, torch.zeros_like(x[:1]), dictionary, 3)
    assert not zero.values.any()
    assert torch.isfinite(zero.residual).all()
    half = run(form, x.bfloat16(), dictionary.bfloat16(), 3)
    assert half.values.dtype == half.residual.dtype == torch.bfloat16
    wide = run(form, x.bfloat16().float(), dictionary.bfloat16().float(), 3)
    assert torch.equal(half.indices, wide.indices)


@pytest.mark.parametrize("form", FORMS)
def test_operators_are_sound(form):
    x, dictionary = problem(B=4)
    x, dictionary = x.requires_grad_(), dictionary.requires_grad_()
    fit = "gradient step" if "gradient" in form else "least squares"
    nonnegative = form in ("non-negative omp", "gradient pursuit")
    arguments = (None, 3, 0.0, 0.0, False, "relu", fit, nonnegative, "auto")
    found = torch.ops.mpsae.refit_pursuit(x.detach(), dictionary.detach(), *arguments)
    torch.library.opcheck(
        torch.ops.mpsae.refit_pursuit, (x.detach(), dictionary.detach(), *arguments)
    )
    indices, values, steps = found
    torch.library.opcheck(
        torch.ops.mpsae.refit_values, (x, dictionary, indices, values, steps, fit, nonnegative)
    )


@pytest.mark.parametrize("form", FORMS)
def test_autocast_computes_in_fp32(form):
    x, dictionary = problem(dtype=torch.float32)
    plain = run(form, x, dictionary, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(form, x, dictionary, 4)
    assert torch.equal(plain.values, under.values)


@needs_kernel
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("coherence", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_kernel_stands_behind_the_operator(form, coherence, stops):
    x, dictionary = problem(B=60, coherence=coherence, dtype=torch.float32)
    k, options = 9, {}
    if stops:
        k = torch.arange(60) % 10
        options["residual_threshold"] = 0.3 * float(x.norm(dim=1).mean())
    found = []
    for backend in ("cpu", "torch"):
        leaves = x.clone().requires_grad_(), dictionary.clone().requires_grad_()
        p = run(form, *leaves, k, backend=backend, **options)
        (p.values.sin().sum() + p.residual.square().sum()).backward()
        found.append((p, *(leaf.grad for leaf in leaves)))
    (compiled, *grads), (plain, *expected) = found
    assert torch.equal(compiled.indices, plain.indices)
    assert torch.equal(compiled.steps, plain.steps)
    for ours, theirs in zip((compiled.values, *grads), (plain.values, *expected), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@needs_kernel
def test_the_kernel_runs_once_its_gram_matrix_is_paid_for(monkeypatch):
    calls = []
    compiled = cpu_orthogonal.orthogonal_pursuit
    monkeypatch.setattr(
        cpu_orthogonal, "orthogonal_pursuit", lambda *a, **o: calls.append(1) or compiled(*a, **o)
    )
    x, dictionary = problem(B=5, n=60, dtype=torch.float32)
    for _ in range(3):  # 20 steps each, 60 atoms
        assert not calls
        orthogonal_matching_pursuit(x, dictionary, 4)
    assert len(calls) == 1
    orthogonal_matching_pursuit(x[:1], dictionary, 1)  # the matrix is at hand
    assert len(calls) == 2
    dictionary += 1  # and now it is not
    orthogonal_matching_pursuit(x[:1], dictionary, 1)
    assert len(calls) == 2
    monkeypatch.setattr("mpsae.refit.free_bytes", lambda device: 60)
    orthogonal_matching_pursuit(x.repeat(90, 1), dictionary.clone(), 4)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="the Gram matrix of 60 atoms, more than 25% of the free"):
        orthogonal_matching_pursuit(x, dictionary.clone(), 4, backend="cpu")


def test_what_the_kernel_does_not_do_is_refused():
    x, dictionary = problem()
    with pytest.raises(ValueError, match="the input is fp64"):
        orthogonal_matching_pursuit(x, dictionary, 2, backend="cpu")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, d: orthogonal_matching_pursuit(x, d, 0), "k must be at least 1, not 0"),
        (lambda x, d: orthogonal_matching_pursuit(x[:, :3], d, 2), "x has 3 features"),
        (
            lambda x, d: orthogonal_matching_pursuit(x, d, 2, nonnegative=True, select="abs"),
            "goes with select='relu', not with 'abs'",
        ),
        (lambda x, d: gradient_pursuit(x, d, 2, select="best"), "select must be .* not 'best'"),
        (lambda x, d: gradient_pursuit(x, d, 2, backend="triton"), "backend must be .*'triton'"),
        (
            lambda x, d: orthogonal_matching_pursuit(x / 0, d, 2, check_finite=True),
            "at row 0, feature 0",
        ),
    ],
)
def test_errors_name_the_value(call, match):
    with pytest.raises(ValueError, match=match):
        call(*problem())
