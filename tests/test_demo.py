"""The tour: one page that holds everything."""

import re

from frameloom.cli import demo
from frameloom.progress import silent
from frameloom.video.reader import read


def test_the_page_holds_its_videos_and_needs_nothing_else(tmp_path):
    page = demo.run(str(tmp_path), quick=True, progress=silent).read_text()
    assert page.count("<video") == 7
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for method in ("hnerv", "x264", "x265", "av1"):
        assert f"<td>{method}<td>" in page
    slow, source = read(tmp_path / "photographs-slow.mp4"), read(tmp_path / "photographs.mp4")
    assert (len(slow), slow.rate) == (4 * len(source), source.rate)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"<td>(?:hnerv|x26.|av1)<td>([\d,]+)<td>", page)]
    assert max(sizes) == sizes[0], "the conventional codecs get no more bytes than the network"
