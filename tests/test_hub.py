"""SAEs to and from a hub on loopback: huggingface_hub's own client against tests/hub_server.py."""

import socket

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Repo, serving
from huggingface_hub import constants
from huggingface_hub.utils import _http
from sae_problems import CFG, KINDS, WEIGHTS, trained

from mpsae import SparseAutoencoder
from mpsae.sae import hub as hub_module

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # between its packages
]
LOAD = SparseAutoencoder.from_pretrained
NAME = "user/saes"


@pytest.fixture
def strangers(monkeypatch):
    """Hosts other than this one that anything tried to reach; there must be none."""
    tried, connect, resolve = [], socket.socket.connect, socket.getaddrinfo

    def guard(real, host_of):
        def call(*args, **kwargs):
            if host_of(args) not in ("127.0.0.1", "localhost"):
                tried.append(args)
                raise ConnectionRefusedError(f"the tests have no network: {args}")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(socket.socket, "connect", guard(connect, lambda args: args[1][0]))
    monkeypatch.setattr(socket, "getaddrinfo", guard(resolve, lambda args: args[0]))
    yield tried
    assert tried == []


@pytest.fixture
def hub(monkeypatch, tmp_path, strangers):
    """The stub in the place of the hub, a cache of its own, and a token in the environment."""
    with serving() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no" / "token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its retries
        _http.close_session()
        yield server
        _http.close_session()


def files_of(sae, folder):
    """Bytes that save_pretrained writes."""
    sae.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in (CFG, WEIGHTS)}


def readme(hub, revision="main"):
    repo = hub.repos[NAME]
    return repo.trees[repo.resolve(revision)]["README.md"].decode()


def assert_same(read, sae):
    assert read.config == sae.config
    assert read.metadata == sae.metadata
    for name, tensor in sae.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def fails(call, *said):
    with pytest.raises(OSError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert TOKEN not in message
    for part in said:
        assert part in message, message


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pushed_comes_back_to_the_last_bit(hub, tmp_path, kind):
    sae = trained(kind)
    assert sae.push_to_hub(NAME) == f"{hub.url}/{NAME}"
    repo = hub.repos[NAME]
    assert set(repo.head) == {".gitattributes", "README.md", CFG, WEIGHTS}
    assert files_of(sae, tmp_path / "sae").items() <= repo.head.items()
    assert list(repo.messages.values()) == ["initial commit", "Upload an SAE"]
    assert repo.lfs == {WEIGHTS}
    hub.seen.clear()
    read = LOAD(NAME)
    assert type(read) is type(sae)
    assert_same(read, sae)
    commit = repo.refs["main"]
    assert hub.asked("HEAD") == [
        f"/{NAME}/resolve/main/{CFG}", f"/{NAME}/resolve/{commit}/{WEIGHTS}"
    ]  # fmt: skip
    assert hub.asked("GET") == [f"/{NAME}/resolve/main/{CFG}"]  # the weights came from the store
    hub.store.seen.clear()
    assert_same(LOAD(NAME), sae)
    assert hub.store.seen == []


def test_subfolders_hold_several(hub):
    saes = {"topk/layers.1": trained("topk"), "untied/layers.1_input": trained("untied")}
    for name, sae in saes.items():
        sae.push_to_hub(NAME, subfolder=name)
    for name, sae in saes.items():
        assert_same(LOAD(NAME, subfolder=name), sae)
    both = "pass one of subfolder='topk/layers.1', 'untied/layers.1_input'"
    fails(lambda: LOAD(NAME), "'user/saes': there is no cfg.json with sae_weights", both)
    fails(lambda: LOAD(NAME, subfolder="topk"), "the SAE 'topk' of the hub repo 'user/saes'", both)
    trained("topk", seed=3).push_to_hub(NAME, subfolder="topk/layers.1/")
    assert LOAD(NAME, subfolder="topk/layers.1").config.seed == 3
    assert len([path for path in hub.repos[NAME].head if path.endswith(CFG)]) == 2


def test_revisions_are_branches_tags_and_commits(hub):
    old, new, other = (trained("topk", seed=seed) for seed in range(3))
    old.push_to_hub(NAME)
    refs = hub.repos[NAME].refs
    first = refs["v1"] = refs["main"]
    new.push_to_hub(NAME)
    other.push_to_hub(NAME, revision="wide/er")
    for revision, sae in {None: new, "main": new, "v1": old, first: old, "wide/er": other}.items():
        assert_same(LOAD(NAME, revision=revision), sae)
    other.push_to_hub(NAME, revision="wide/er")
    assert len(hub.repos[NAME].messages) == 4  # nothing had changed
    trained("topk", seed=5).push_to_hub(NAME, revision="wide/er")
    assert LOAD(NAME, revision="wide/er").config.seed == 5
    assert f"from_pretrained('{NAME}', revision='wide/er')" in readme(hub, "wide/er")


def test_both_files_are_of_one_commit(hub, tmp_path, monkeypatch):
    old, new = trained("topk"), trained("topk", aux_k=5)
    old.push_to_hub(NAME)
    real = huggingface_hub.hf_hub_download

    def download(repo_id, filename, **options):
        path = real(repo_id, filename, **options)
        if filename == CFG:
            hub.repos[NAME].commit("main", files_of(new, tmp_path / "new"), "meanwhile")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with torch.no_grad():
        new.dictionary.neg_()
    assert_same(LOAD(NAME), old)


def test_private_reaches_the_hub(hub, monkeypatch):
    trained("topk").push_to_hub(NAME, private=True)
    trained("topk").push_to_hub("user/open")
    assert (hub.repos[NAME].visibility, hub.repos["user/open"].visibility) == ("private", None)
    LOAD(NAME)
    monkeypatch.delenv("HF_TOKEN")
    LOAD("user/open")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    fails(lambda: LOAD(NAME), f"'{NAME}'", "or it is private", "hf auth login", "HF_TOKEN")


def test_the_token_goes_to_the_hub_as_a_bearer_and_nowhere_else(hub, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    trained("topk").push_to_hub(NAME, subfolder="a")
    LOAD(NAME, subfolder="a").save_pretrained(tmp_path / "again")
    assert len(hub.seen) > 8
    for method, path, headers, body in hub.seen:
        assert headers.pop("authorization", None) == f"Bearer {TOKEN}", (method, path)
        assert TOKEN not in f"{path}{headers}"
        assert TOKEN.encode() not in body
    assert {method for method, *_ in hub.store.seen} == {"PUT", "GET"}
    assert TOKEN not in repr(hub.store.seen)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text


def test_a_local_folder_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae = trained("topk")
    sae.save_pretrained(tmp_path / NAME / "inside")
    assert_same(LOAD(NAME, subfolder="inside"), sae)
    assert_same(LOAD(f"{NAME}/inside"), sae)
    fails(lambda: LOAD(NAME), f"no {CFG} in {NAME}")
    with pytest.raises(ValueError, match="revision='v1' is for hub ids, but user/saes is a local"):
        LOAD(NAME, revision="v1", subfolder="inside")
    assert hub.seen == []


@pytest.mark.parametrize("source", ["nobody", "a/b/c", "/no/such", "./a/b", "a b/c", "../b"])
def test_neither_folder_nor_hub_id(hub, source):
    fails(lambda: LOAD(source), f"{source!r} is neither a local folder nor a hub id (user/repo)")
    assert hub.seen == []


@pytest.mark.parametrize("subfolder", ["../b", "/a", "a/../../b"])
def test_subfolders_do_not_lead_out(hub, tmp_path, subfolder):
    for call in (
        lambda: LOAD(NAME, subfolder=subfolder),
        lambda: LOAD(tmp_path, subfolder=subfolder),
        lambda: trained("topk").push_to_hub(NAME, subfolder=subfolder),
    ):
        with pytest.raises(ValueError, match=f"subfolder='{subfolder}' must be"):
            call()
    assert hub.seen == []


def bad_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_network(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(hub.url, url))


def gated(hub, monkeypatch):
    hub.repos[NAME].gated = True


def no_weights(hub, monkeypatch):
    hub.repos[NAME].commit("main", {}, "less")
    del hub.repos[NAME].head[WEIGHTS]


def empty(hub, monkeypatch):
    hub.repos[NAME] = Repo()


def broken(hub, monkeypatch):
    hub.faults["HEAD", "/resolve/"] = (500, {})


def forbidden(hub, monkeypatch):
    hub.faults["HEAD", "/resolve/"] = (403, {})


def disappears(hub, monkeypatch):
    del hub.repos[NAME]


def nothing(hub, monkeypatch):
    pass


@pytest.mark.parametrize(
    ("happens", "revision", "said"),
    [
        (disappears, None, "there is no such repo or local folder, or it is private"),
        (bad_token, None, "the token was refused; log in (hf auth login) or set HF_TOKEN"),
        (gated, None, "it is gated; accept its terms"),
        (nothing, "v9", "it has no revision 'v9'; pass a branch, a tag or a commit"),
        (no_weights, None, "there is no cfg.json with sae_weights.safetensors at that place"),
        (empty, None, "at that place, nor at any other"),
        (offline, None, "HF_HUB_OFFLINE is set, and the cache does not have it"),
        (no_network, None, "ConnectError: "),
        (broken, None, "500"),
        (forbidden, None, "does not give the right"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(hub, monkeypatch, happens, revision, said):
    trained("topk").push_to_hub(NAME)
    happens(hub, monkeypatch)
    fails(lambda: LOAD(NAME, revision=revision), f"cannot load the hub repo '{NAME}'", said)


@pytest.mark.parametrize("away", [offline, no_network])
def test_the_cache_serves_where_the_hub_does_not(hub, monkeypatch, away):
    sae = trained("topk")
    sae.push_to_hub(NAME, subfolder="a/b")
    LOAD(NAME, subfolder="a/b")
    away(hub, monkeypatch)
    hub.seen.clear()
    assert_same(LOAD(NAME, subfolder="a/b"), sae)
    assert_same(LOAD(NAME, subfolder="a/b", revision=hub.repos[NAME].refs["main"]), sae)
    fails(lambda: LOAD(NAME, subfolder="a"), "cannot load the SAE 'a' of")
    assert hub.seen == []


def no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def others_repo(hub, monkeypatch):
    hub.user = "somebody"
    hub.repos[NAME] = Repo()


def breaks(hub, monkeypatch):
    hub.faults["POST", "/preupload/"] = (400, {})


PUSH_ERRORS = [
    (no_token, "there is no token; log in (hf auth login) or set HF_TOKEN"),
    (bad_token, "the token was refused"),
    (others_repo, "the token does not give the right to"),
    (offline, "HF_HUB_OFFLINE is set"),
    (no_network, "ConnectError: "),
    (breaks, "BadRequestError: "),
]


@pytest.mark.parametrize(("happens", "said"), PUSH_ERRORS)
def test_what_cannot_be_pushed_is_said_in_a_line(hub, monkeypatch, happens, said):
    happens(hub, monkeypatch)
    for call in (
        lambda: trained("topk").push_to_hub(NAME),
        lambda: hub_module.check_can_push(NAME),
    ):
        fails(call, f"cannot push to the hub repo '{NAME}': ", said)
    assert not any(len(repo.messages) > 1 for repo in hub.repos.values())


@pytest.mark.parametrize("name", ["saes", "a/b/c", "/tmp/saes", "a--b/c", "", None])
def test_a_push_needs_user_and_repo(hub, name):
    for call in (trained("topk").push_to_hub, hub_module.check_can_push):
        with pytest.raises(ValueError, match="is no hub id, which has the form user/repo") as error:
            call(name)
        assert repr(name) in str(error.value)
    assert hub.seen == []


def test_asking_for_the_right_to_write_makes_the_repo_and_no_commit(hub):
    for _ in range(2):
        hub_module.check_can_push(NAME)
    assert list(hub.repos[NAME].messages.values()) == ["initial commit"]
