"""The page to try a model, in a real browser: what a person sees, hears and can reach with the keys alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from marten.archive import plan_archive, write_archive
from marten.readiness import Address, free_ports
from marten.web import PageServer
from tests.browsers import browser, open_page
from tests.pictures import draw, encode
from tests.servers import Serve
from tests.test_web import Inference, listening

pytestmark = pytest.mark.browser
__all__ = ["browser", "open_page"]  # fixtures

PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
PNG = encode(draw(3, (224, 224)), "PNG")
TIMING = {"Content-Type": "application/json", "Server-Timing": "decode;dur=2.5, forward;dur=20"}
SURE = (200, TIMING, b'{"cat": 0.75, "dog": 0.2}')
HEAT = (200, {"Content-Type": "image/png"}, PNG)


def refusal(status: int, message: str = "the server's words", **headers: str) -> tuple[int, dict[str, str], bytes]:
    told = {"code": status, "message": message, "request_id": "id-1"}
    return status, {"Content-Type": "application/json", **headers}, json.dumps(told).encode()


@pytest.fixture
def inference() -> Iterator[Inference]:
    server = Inference({"/predictions/pets": [SURE], "/explanations/pets": [HEAT], "/predictions/more": [SURE]})
    with listening(server):
        yield server


@pytest.fixture
def address(inference: Inference) -> Iterator[str]:
    with listening(PageServer(0, Address("127.0.0.1", inference.server_port), ("pets", "more"))) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my photo.jpg"
    path.write_bytes(encode(draw(5, (640, 480)), "JPEG"))
    return path


def show(page: Any, *paths: Path) -> Any:
    """Choose files, and wait for what becomes of all of them; the card of the first."""
    page.get_by_label("Model").wait_for()
    page.set_input_files("#files", [str(path) for path in paths])
    page.locator("article:not(.waiting)", has=page.locator("button:visible")).nth(len(paths) - 1).wait_for()
    return page.locator("article").first


def test_an_answer_is_bars_a_time_and_a_command(open_page: Callable[..., Any], address: str, photo: Path) -> None:
    page = open_page(address, reduced_motion="reduce")
    card = show(page, photo)
    assert card.locator("h3").inner_text() == "cat"
    assert card.locator(".bars li").all_inner_texts() == ["cat\n75.0 %", "dog\n20.0 %", "everything else\n5.0 %"]
    widths = [
        bar.evaluate("e => parseFloat(getComputedStyle(e, '::after').width) / e.clientWidth")
        for bar in card.locator(".bars i").all()
    ]
    assert widths == pytest.approx([0.75, 0.2, 0.05], abs=0.02)
    assert re.search(r"Answered in .*: reading the picture 2.5 ms, network 20 ms, way and wait", card.inner_text())
    assert card.locator("code").text_content() == f"curl -T 'my photo.jpg' {address}predictions/pets"
    assert page.locator("#said").inner_text() == "pets answers: cat, 75.0 %"


def test_the_bytes_that_arrive_are_the_files(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference
) -> None:
    show(open_page(address), photo)
    assert inference.asked[0][2] == photo.read_bytes()


def test_the_heat_map_is_laid_over_and_taken_away(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference
) -> None:
    page = open_page(address)
    card = show(page, photo)
    look, picture = card.locator(".look"), card.locator(".picture")
    own = picture.get_attribute("src")
    for pressed in ("true", "false", "true"):
        look.click()
        page.locator(f".look[aria-pressed={pressed}]").wait_for()
        assert (picture.get_attribute("src") == own) == (pressed == "false")
    assert "heat map" in picture.get_attribute("alt")
    assert picture.evaluate("e => e.decode().then(() => e.naturalWidth)") == 224
    assert [path for path, _, _ in inference.asked] == ["/predictions/pets", "/explanations/pets"]  # asked for once


def test_another_model_is_chosen(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference
) -> None:
    page = open_page(address)
    page.get_by_label("Model").select_option("more")
    show(page, photo)
    assert inference.asked[0][0] == "/predictions/more"
    assert open_page(f"{address}?model=more").get_by_label("Model").input_value() == "more"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "No picture arrived"),
        (404, "There is no such model here"),
        (413, "The picture is too large"),
        (415, "This is not a picture the model can read"),
        (422, "The picture is damaged"),
        (500, "Something broke on the server"),
    ],
)
def test_refusals_are_told_in_words(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference, status: int, words: str
) -> None:
    inference.answers["/predictions/pets"] = [refusal(status), SURE]
    page = open_page(address)
    card = show(page, photo)
    assert card.locator("h3").inner_text() == words
    assert "The server says: the server's words. Request id-1" in card.inner_text()
    assert page.locator("#said").inner_text().startswith(words)
    card.get_by_role("button", name="Ask again").click()
    page.get_by_role("heading", name="cat").wait_for()
    assert not page.locator(".refused").count()


def test_a_busy_server_is_asked_again_by_itself(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference
) -> None:
    busy = refusal(503, **{"Retry-After": "0"})
    inference.answers["/predictions/pets"] = [busy, refusal(429, **{"Retry-After": "0"}), SURE]
    card = show(open_page(address), photo)
    assert card.locator("h3").inner_text() == "cat"
    assert len(inference.asked) == 3


def test_a_key_is_asked_for_sent_and_kept_for_the_tab(open_page: Callable[..., Any], address: str, photo: Path) -> None:
    """As the front door does it, which hands out the page to all and wants a key for predictions."""

    def guard(route: Any) -> None:
        fits = route.request.headers.get("authorization") == "Bearer sesame"
        route.continue_() if fits else route.fulfill(status=401, body="")

    page = open_page(address)
    page.route("**/predictions/*", guard)
    card = show(page, photo)
    assert card.locator("h3").inner_text() == "A key is needed"
    page.get_by_label("This server asks for a key").fill("sesame")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="cat").wait_for()
    assert "Authorization: Bearer $MARTEN_KEY" in card.locator("code").text_content()
    page.reload()
    assert show(page, photo).locator("h3").inner_text() == "cat"


def test_pictures_are_dropped_and_pasted(open_page: Callable[..., Any], address: str, photo: Path) -> None:
    page = open_page(address)
    page.get_by_label("Model").wait_for()
    for event, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, field, bytes]) => {
                const held = new DataTransfer();
                held.items.add(new File([new Uint8Array(bytes)], event + ".jpg", { type: "image/jpeg" }));
                const Kind = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new Kind(event, { [field]: held, bubbles: true, cancelable: true }));
            }""",
            [event, field, list(photo.read_bytes())],
        )
        page.locator("figcaption", has_text=f"{event}.jpg").wait_for()
    page.get_by_role("heading", name="cat").nth(1).wait_for()


def test_a_picture_over_the_limit_is_made_smaller_first(
    open_page: Callable[..., Any], address: str, tmp_path: Path, inference: Inference
) -> None:
    noise = Image.effect_noise((4600, 3500), 90).convert("RGB")
    path = tmp_path / "large.bmp"
    noise.save(path)
    assert path.stat().st_size > 16 * 1024 * 1024
    card = show(open_page(address), path)
    assert "made smaller before it was sent" in card.inner_text()
    arrived = tmp_path / "arrived.jpg"
    arrived.write_bytes(inference.asked[0][2])
    with Image.open(arrived) as picture:
        assert (picture.format, max(picture.size)) == ("JPEG", 4096)


def test_it_is_worked_by_keys_alone(open_page: Callable[..., Any], address: str, photo: Path) -> None:
    page = open_page(address)
    # asked for long before: Chromium is told to hand choosers over in a message that a key could overtake
    choosers: list[Any] = []

    def keep(chooser: Any) -> None:
        choosers.append(chooser)

    page.on("filechooser", keep)
    page.get_by_label("Model").wait_for()
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.id == 'model'")
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.id == 'choose'")
    page.keyboard.press("Enter")
    for _ in range(200):
        if choosers:
            break
        page.wait_for_timeout(100)
    choosers[0].set_files(str(photo))
    page.locator(".look:visible").wait_for()
    page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.className == 'look'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    page.locator(".look[aria-pressed=true]").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_and_a_phone_scrolls_one_way(
    open_page: Callable[..., Any], address: str, photo: Path, inference: Inference, scheme: str, options: dict[str, Any]
) -> None:
    """Contrast, names, roles and order, before the first picture and with answers of each kind."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = open_page(address, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce", **options)
    page.get_by_label("Model").wait_for()
    assert axe.Axe().run(page).response["violations"] == []
    assert page.get_by_role("button", name="Take a photograph").is_visible() == (options == PHONE)
    inference.answers["/predictions/pets"] = [SURE, refusal(422)]
    show(page, photo, photo)
    page.locator(".look:visible").click()
    page.locator(".look[aria-pressed=true]").wait_for()
    page.locator("summary:visible").click()
    assert axe.Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


@pytest.mark.server
def test_a_real_model_is_tried(
    open_page: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path, photo: Path
) -> None:
    planned = plan_archive(tiny_model(topk=2), name="pets", export_path=tmp_path / "store")
    write_archive(planned)
    *ports, web = free_ports(4)
    serve = Serve(tmp_path / "store", tmp_path / "run", ports)
    try:
        started = serve.run("start", "pets", "--web", "--web_port", str(web))
        assert started.returncode == 0, started.stderr
        damaged = tmp_path / "damaged.jpg"
        damaged.write_bytes(photo.read_bytes()[:2000])
        page = open_page(f"http://127.0.0.1:{web}/")
        page.get_by_label("Model").wait_for()
        card = show(page, photo, damaged)
        assert card.locator("h3").inner_text() in ("cat", "dog")
        assert re.search(r"reading the picture [\d.]+ ms, network [\d.]+ ms", card.inner_text())
        assert page.locator(".refused h3").inner_text() == "The picture is damaged"
        card.locator(".look").click()
        page.locator(".look[aria-pressed=true]").wait_for()
        assert card.locator(".picture").evaluate("e => e.decode().then(() => e.naturalWidth)") == 224
    finally:
        assert serve.run("stop", "--drain_s", "0").returncode == 0
    assert serve.leftovers() == []
