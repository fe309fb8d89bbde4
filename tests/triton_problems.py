"""Problems for the pursuit kernels, and the properties that every answer has to have.

Selection is discrete: two atoms within rounding of each other may be taken in either order, and
all that follows differs. So an answer is not compared with the reference index by index, but
replayed in fp64 from its own choices: each of them has to be the best at the residual that the
earlier ones leave, within ``MARGIN``. Indices are compared where no choice is that close.
"""

import torch

from mpsae.reference import PursuitOptions, best_atom, matching_pursuit

MARGIN = 2e-6  # of ||x|| max ||encoder||: fp32 sums of up to 2304 products
FAST_MARGIN = 2e-3  # int16 without a certificate: k updates, each off by half of 2^-15
TINY = 1e-30


def problem(B, d, n, dtype=torch.float32, seed=0, device="cpu"):
    """``x`` and ``dictionary`` with atoms near unit norm, drawn in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    dictionary *= 0.8 + 0.4 * torch.rand(n, 1, generator=generator)
    x = torch.randn(B, d, generator=generator)
    return x.to(device, dtype), dictionary.to(device, dtype)


def replayed_margins(x, dictionary, answer, *, encoder=None, bias=None, margin=MARGIN, **options):
    """Assert that ``answer`` is a pursuit of ``x`` and return its smallest lead, ``[B]``.

    The lead of a step is by how much the best atom beats the next one; all in fp64, as parts of
    ||x|| max ||encoder||.
    """
    indices, values, residual, steps = answer[:4]
    k_rows = options.pop("k_rows", None)
    slices = options.pop("slices", None)
    settings = PursuitOptions(k=indices.shape[1], **options)
    x, dictionary = x.double(), dictionary.double()
    encoder = dictionary if encoder is None else encoder.double()
    B, n = x.shape[0], len(dictionary)
    unit = x.norm(dim=1) * encoder.norm(dim=1).max()
    if bias is not None:
        unit = unit + bias.abs().max().item()
    allowed = x.new_full((B,), settings.k) if k_rows is None else k_rows.clamp(max=settings.k)
    lead = x.new_full((B,), float("inf"))
    r = x.clone()
    over = torch.zeros(B, dtype=torch.bool, device=x.device)
    for t in range(settings.k):
        c = r @ encoder.T
        if bias is not None:
            c = c + bias.double()
        banned = indices[:, : 0 if settings.allow_repeats else t]
        window = None if slices is None else slices[t]
        best, first = best_atom(c, settings.select, window, banned)
        others = torch.cat([banned, first[:, None]], 1)
        second, _ = best_atom(c, settings.select, window, others)
        may, took = ~over & (t < allowed), t < steps
        slack = margin * unit + TINY
        assert not (took & ~may).any(), "a step after the last one"
        assert not (took & (best < settings.threshold - slack)).any(), "no atom was good enough"
        assert not (may & ~took & (best > settings.threshold + slack)).any(), "stopped too soon"
        j = indices[:, t]
        assert ((j >= 0) & (j < n)).all()
        own = c.gather(1, j[:, None])[:, 0]
        score = own.abs() if settings.select == "abs" else own
        assert (score >= best - slack)[took].all(), "a better atom was passed over"
        assert not (took & (banned == j[:, None]).any(1)).any(), "a banned atom"
        if window is not None:
            assert ((j >= window[0]) & (j < window[1]))[took].all(), "an atom out of its slice"
        value = own.relu() if settings.select == "relu" else own
        assert ((values[:, t] - value).abs() <= MARGIN * unit + TINY)[took].all()
        assert not indices[:, t][~took].any()
        assert not values[:, t][~took].any()
        step_lead = torch.minimum(best - second, (best - settings.threshold).abs())
        lead = torch.where(may, torch.minimum(lead, step_lead / (unit + TINY)), lead)
        r = r - values[:, t, None].double() * dictionary[j]
        over |= ~took
        if settings.stop_on_repeat:
            over |= (indices[:, :t] == j[:, None]).any(1)
        if settings.residual_threshold > 0:
            over |= r.norm(dim=1) < settings.residual_threshold
    off = (residual - r).norm(dim=1) / x.norm(dim=1).clamp_min(TINY)
    assert (off <= MARGIN).all(), f"residual is off by {off.max().item():.1e}"
    return lead


def assert_pursuit(x, dictionary, answer, *, encoder=None, bias=None, margin=MARGIN, **options):
    """Assert that ``answer`` is a pursuit, with the reference's indices where no tie is near."""
    lead = replayed_margins(
        x, dictionary, answer, encoder=encoder, bias=bias, margin=margin, **options
    )
    k_rows, slices = options.pop("k_rows", None), options.pop("slices", None)
    expected = matching_pursuit(
        x.double(),
        dictionary.double(),
        None if encoder is None else encoder.double(),
        None if bias is None else bias.double(),
        PursuitOptions(k=answer[0].shape[1], **options),
        k_rows=k_rows,
        slices=slices,
    )
    clear = lead > 2 * margin
    assert torch.equal(answer[0][clear], expected.indices[clear])
    assert torch.equal(answer[3][clear], expected.steps[clear])
    return clear.double().mean().item() if len(clear) else 1.0
