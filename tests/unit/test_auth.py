import hashlib
import stat

import pytest

from cluster.errors import ConfigError
from serving.gateway.auth import KeyRing, make_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "api-keys"


def write(path, text, mode=0o600):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_make_key_when_file_is_missing_makes_a_private_one(path):
    make_key(path, "alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_make_key_when_called_keeps_no_key_on_disk(path):
    key = make_key(path, "alice")
    assert path.read_text() == f"alice:{hashlib.sha256(key.encode()).hexdigest()}\n"


def test_owner_when_key_is_known_names_it(path):
    alice, bob = make_key(path, "alice"), make_key(path, "bob")
    keys = KeyRing(path)
    assert (keys.owner(alice), keys.owner(bob)) == ("alice", "bob")


@pytest.mark.parametrize("key", ["", "rs-wrong", "alice", "\xff"])
def test_owner_when_key_is_unknown_is_none(path, key):
    make_key(path, "alice")
    assert KeyRing(path).owner(key) is None


def test_owner_when_digest_is_sent_as_key_is_none(path):
    make_key(path, "alice")
    digest = path.read_text().strip().partition(":")[2]
    assert KeyRing(path).owner(digest) is None


def test_owner_when_line_was_removed_is_none_at_once(path):
    alice = make_key(path, "alice")
    make_key(path, "bob")
    keys = KeyRing(path)
    write(path, path.read_text().splitlines()[1] + "\n")
    assert keys.owner(alice) is None


def test_owner_when_file_vanished_raises(path):
    key = make_key(path, "alice")
    keys = KeyRing(path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.owner(key)


def test_make_key_when_every_key_was_removed_makes_the_first_again(path):
    make_key(path, "alice")
    write(path, "# none left\n")
    key = make_key(path, "bob")
    assert KeyRing(path).owner(key) == "bob"


def test_make_key_when_name_exists_is_refused(path):
    make_key(path, "alice")
    with pytest.raises(ConfigError, match="has a key `alice`"):
        make_key(path, "alice")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "../x", "a\nb"])
def test_make_key_when_name_is_unsafe_is_refused(path, name):
    with pytest.raises(ConfigError, match="not allowed"):
        make_key(path, name)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660])
def test_key_ring_when_others_may_read_is_refused(path, mode):
    write(path, f"alice:{'0' * 64}\n", mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyRing(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no keys"),
        ("# only a comment\n\n", "has no keys"),
        ("alice:short\n", "line 1: expected name:sha256"),
        (f"alice:{'A' * 64}\n", "line 1: expected name:sha256"),
        (f"# x\nalice:{'0' * 64}\nalice:{'1' * 64}\n", "line 3: a second key `alice`"),
    ],
)
def test_key_ring_when_file_is_wrong_names_the_line(path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        KeyRing(write(path, text))


def test_key_ring_when_file_is_no_text_says_so(path):
    write(path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        KeyRing(path)


def test_key_ring_when_path_is_a_folder_says_so(path):
    path.mkdir(parents=True, mode=0o700)
    with pytest.raises(ConfigError, match="directory"):
        KeyRing(path)


def test_key_ring_when_file_is_missing_says_what_to_do(path):
    with pytest.raises(ConfigError, match="raysmith keys new"):
        KeyRing(path)
