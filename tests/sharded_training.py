"""Training of sharded SAEs on the ranks of the tests, beside the same in one process."""

import torch
import torch.distributed as dist

from mpsae import MatchingPursuitConfig, MatchingPursuitSAE
from mpsae.sae.sharded import ShardedMatchingPursuitSAE

D, N, K, BATCH, MAX_NORM = 8, 31, 2, 24, 0.3  # 31 atoms do not go evenly on 2 or 4 ranks


def config(**settings):
    # of this many atoms few are used, so that some are dead after three batches
    sizes = {"d_in": D, "d_sae": N, "k": K, "dead_after": 3 * BATCH, "aux_k": 4}
    return MatchingPursuitConfig(**sizes | settings)


def rows(step, count=BATCH):
    """Sums of a few of 12 features, far from 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, D, generator=generator, dtype=torch.float64)
    generator.manual_seed(step + 1)
    active = torch.rand(count, 12, generator=generator, dtype=torch.float64) < 0.2
    return 1 + (active * torch.rand(count, 12, generator=generator, dtype=torch.float64)) @ features


def train(sae, clip, steps):
    """Train; what each step gave, in numbers."""
    sae = sae.double().train()
    sae.initialize_b_dec_(rows(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-2)
    sae.constrain(optimizer)
    seen = {"indices": [], "losses": [], "norms": [], "dead": []}
    for step in range(steps):
        output = sae(rows(step))
        output.loss.backward()
        seen["norms"].append(clip(sae).item())
        optimizer.step()
        optimizer.zero_grad()
        seen["indices"].append(output.code.indices)
        seen["losses"].append({name: loss.item() for name, loss in output.losses.items()})
        seen["dead"].append(sae.dead_latents())
    return seen | {"b_dec": sae.b_dec.detach(), "rows_since_fired": sae.rows_since_fired}


def train_whole(steps, **settings):
    sae = MatchingPursuitSAE(config(**settings))
    found = train(
        sae, lambda sae: torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM), steps
    )
    return found, sae


def train_sharded(steps, settings):
    share = ShardedMatchingPursuitSAE(config(**settings))
    found = train(share, lambda sae: sae.clip_grad_norm_(MAX_NORM), steps)
    whole = share.gather()
    return found, None if whole is None else whole.state_dict()


def error_of(call, *arguments, **settings):
    """The name and message of the error that a call raises."""
    try:
        call(*arguments, **settings)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def initial(settings):
    """The whole of new shares, as fp32 weights."""
    whole = ShardedMatchingPursuitSAE(config(**settings)).gather()
    return None if whole is None else whole.state_dict()


def seen_sae(**settings):
    """A whole SAE with a past, in fp64."""
    sae = MatchingPursuitSAE(config(**settings)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    sae.metadata = {"model_name": "tiny"}
    sae.rows_since_fired.copy_(torch.arange(N))
    return sae


def through_files(folder, settings):
    """Write a share's whole to a folder and read it; outputs before and after."""
    share = ShardedMatchingPursuitSAE.from_whole(seen_sae(**settings)).eval()
    before = share(rows(0)).reconstruction.detach()
    assert share.save_pretrained(folder) == folder
    again = ShardedMatchingPursuitSAE.from_pretrained(folder)
    whole = again.gather()
    after = again(rows(0)).reconstruction.detach()
    written = None if whole is None else (whole.state_dict(), whole.metadata)
    return before, after, share.rows_since_fired, written


def decoded(settings):
    """A decoded code of fixed values, and gradients of values, dictionary and b_dec."""
    share = ShardedMatchingPursuitSAE.from_whole(seen_sae(**settings))
    code = share.encode(rows(1))
    values = code.values.detach().requires_grad_()
    y = share.decode(code._replace(values=values))
    y.square().sum().backward()
    whole = share.gather_rows(share.dictionary.grad)
    return y.detach(), values.grad, share.b_dec.grad, whole


def in_a_group(settings):
    """What the members of a group that leaves rank 0 out gather; what rank 0 is told."""
    group = dist.new_group(range(1, dist.get_world_size()))
    if dist.get_rank() == 0:
        return error_of(ShardedMatchingPursuitSAE, config(**settings), group)
    share = ShardedMatchingPursuitSAE.from_whole(seen_sae(**settings), group)
    output = share.train()(rows(0))
    output.loss.backward()
    norm = share.clip_grad_norm_(1.0)
    whole = share.gather()
    return output.loss.item(), norm.item(), None if whole is None else whole.state_dict()


def refused(folder):
    """Errors of settings and files that cannot be, on this rank."""
    rank = dist.get_rank()
    share = ShardedMatchingPursuitSAE(config())
    few = config(d_sae=dist.get_world_size() - 1)
    (folder / "file").touch()
    share.before_pursuit = "topk"
    early = error_of(share.train(), rows(0).float())
    share.before_pursuit = None
    return {
        "settings": [
            error_of(ShardedMatchingPursuitSAE, config(**settings)) for settings in REFUSED
        ],
        "few": error_of(ShardedMatchingPursuitSAE, few),
        "early": early,
        "width": error_of(share, rows(0).float()[:, : D - rank]),
        "dtype": error_of(share, rows(0)),
        "integers": error_of(share, torch.ones(2, D, dtype=torch.int64)),
        "refit": error_of(share.encode, rows(0).float(), refit=True),
        "unwritable": error_of(share.save_pretrained, folder / "file"),
        "missing": error_of(ShardedMatchingPursuitSAE.from_pretrained, folder / "none"),
        "kind": error_of(ShardedMatchingPursuitSAE.from_whole, torch.nn.Linear(2, 2)),
    }


REFUSED = (
    {"slicing": "both", "d_sae": 32},
    {"subtract": "encoder", "tied": False},
    {"pursuit": "omp"},
    {"coselection_coefficient": 0.5},
    {"prefix_loss": True},
    {"atom_dropout": 0.1},
    {"precision": "fast"},
    {"method": "gram"},
    {"backend": "torch"},
)
