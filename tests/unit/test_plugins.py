import pytest

from cluster.errors import ConfigError
from jobs.data import sources
from jobs.plugins import load_plugin, plugin_names


def test_plugin_names_of_a_folder_leave_private_files_out():
    names = plugin_names(sources)
    assert {"jsonl", "parquet", "stdlib", "text"} <= set(names)
    assert not [name for name in names if name.startswith("_")]


def test_load_plugin_when_the_name_is_wrong_lists_the_right_ones():
    with pytest.raises(ConfigError, match=r"no data source `parquett`.*Did you mean `parquet`"):
        load_plugin(sources, "parquett", what="data source")
