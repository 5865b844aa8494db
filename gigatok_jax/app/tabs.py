"""The five tabs of the page: what they show, and what happens when a visitor moves something."""

import dataclasses
import functools
import html
from typing import Any, get_args

import numpy as np

from gigatok_jax.app import explore
from gigatok_jax.app.components import answer, choice, enlarge, examples, figures, gr, photo
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path
from gigatok_jax.sampling import SamplingConfig, Schedule

MAX_SAMPLES = 16
COMPLETIONS = 4
NO_CLASS = "(no class)"
NAMES = {"psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "lpips": "LPIPS {:.3f}"}
NO_GENERATOR = "No generator was given: start `gigatok app` with `--generator=NAME`."


class Session:
    """The networks, and the crops and codes of uploads, remembered while a slider moves."""

    def __init__(self, models: explore.Models, drawings: list[str]):
        self.models, self.drawings = models, drawings
        self.crop = functools.lru_cache(maxsize=64)(explore.read)
        self.codes = functools.lru_cache(maxsize=64)(self._codes)

    def _codes(self, name: str, path: str) -> np.ndarray:
        return np.asarray(self.models.tokenizers[name].encode(self.image(name, path)[None]))[0]

    def image(self, name: str, path: str) -> np.ndarray:
        """The crop of an upload that a tokenizer takes."""
        return self.crop(path, self.models.tokenizers[name].config.image_size)

    def generator_of(self, name: str):
        """A generator of a tokenizer's codes, or None."""
        tokenizers, generators = self.models
        codes = tokenizers[name].codes_of
        pairs = generators.values()
        return next((one for one, own in pairs if tokenizers[own].codes_of == codes), None)


def reconstruct(session: Session) -> None:
    """A photo, what the tokenizers make of it, and what each code does."""
    tokenizers = session.models.tokenizers
    names = list(tokenizers)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = photo("Photo")
            chosen = gr.CheckboxGroup(
                names, value=names, label="Tokenizers", visible=len(names) > 1
            )
            examples([upload], session.drawings)
        with gr.Column(scale=5):
            results = gr.HTML("Drop a photo on the left, or choose a drawing.")
    gr.Markdown("### What does a code do?\nPoint at a code: what depends on it lights up.")
    which = choice(names, "Tokenizer")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            squares = gr.Image(label="Codes", interactive=False, buttons=[], height=400)
        with gr.Column(scale=2, min_width=300):
            changes = gr.Image(label="What changes", interactive=False, buttons=[], height=400)
        with gr.Column(scale=1, min_width=200):
            last = tokenizers[names[0]].config.latents - 1
            position = gr.Slider(0, last, 0, step=1, label="Code", interactive=True)
            facts = gr.Markdown()

    def compare(path, chosen):
        if not path:
            return ""
        if not chosen:
            raise UserError("choose a tokenizer")
        return "".join(map(functools.partial(row, path), chosen))

    def row(path, name):
        image, codes = session.image(name, path), session.codes(name, path)
        result = explore.reconstruct(tokenizers[name], image, codes)
        numbers = ", ".join(NAMES[key].format(value) for key, value in result.metrics.items())
        return figures(
            f"{name}: {len(codes)} codes, {numbers}",
            [
                (image, "input"),
                (result.image, "reconstruction"),
                (result.difference, f"difference, {explore.BRIGHTER} times brighter"),
            ],
        )

    def show_code(path, name, position):
        if not path:
            return None, None, ""
        tokenizer, codes, position = tokenizers[name], session.codes(name, path), int(position)
        effect = explore.effect(tokenizer, codes, position)
        picture = explore.CodePicture(tokenizer).draw(codes, position)
        text = (
            f"Code {position} is {codes[position]}.\n\nAnother in its place changes values by "
            f"{effect.change:.2f} of 255, on average; 90 % of the change is in "
            f"{100 * effect.area:.0f} % of the image."
        )
        return picture, enlarge(effect.picture), text

    def point(name, event: gr.SelectData):
        position = explore.CodePicture(tokenizers[name]).at(*event.index)
        return gr.skip() if position is None else position

    def choose(name):
        return gr.Slider(maximum=tokenizers[name].config.latents - 1, value=0)

    answer(
        [upload.change, chosen.change],
        compare,
        [upload, chosen],
        [results],
        api_name="reconstruct",
    )
    shown = [upload, which, position], [squares, changes, facts]
    answer(upload.change, show_code, *shown, api_name="code")
    answer(position.change, show_code, *shown, api_name=False, show_progress="hidden")
    chose = answer(which.change, choose, [which], [position], api_name=False)
    answer(chose.then, show_code, *shown, api_name=False)
    squares.select(point, [which], [position], api_name=False, show_progress="hidden")


def swap(session: Session) -> None:
    """Codes of one image in another, and the first codes of an image alone."""
    tokenizers = session.models.tokenizers
    count = next(iter(tokenizers.values())).config.latents
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            which = choice(tokenizers, "Tokenizer")
            with gr.Row():
                first_photo, second_photo = photo("A"), photo("B")
            examples([first_photo, second_photo], session.drawings)
        with gr.Column(scale=5):
            gr.Markdown("### Codes of A in B")
            with gr.Row():
                first = gr.Slider(0, count - 1, 0, step=1, label="from code")
                last = gr.Slider(0, count - 1, count // 2 - 1, step=1, label="to code")
            swapped = gr.HTML("Give two images on the left.")
            gr.Markdown("### The first codes of A")
            keep = gr.Slider(0, count, count // 2, step=1, label="codes kept")
            fills = {"the mean of the codebook": False, "codes that the generator draws": True}
            fill = gr.Radio(list(fills), value=next(iter(fills)), label="in place of the others")
            kept = gr.HTML("Give image A on the left.")

    def exchange(name, one, two, first, last):
        if not one or not two:
            return ""
        own, others = session.codes(name, two), session.codes(name, one)
        mixed = explore.swap(own, others, int(first), int(last))
        images = [explore.decode(tokenizers[name], each) for each in (others, own, mixed)]
        caption = f"B with codes {first} to {last} of A"
        return figures(name, list(zip(images, ("A", "B", caption), strict=True)))

    def first_codes(name, path, keep, fill):
        if not path:
            return ""
        generator = session.generator_of(name) if fills[fill] else None
        if fills[fill] and generator is None:
            raise UserError(f"no generator of the codes of {name}: start with --generator=NAME")
        codes = session.codes(name, path)
        image = explore.keep_first(tokenizers[name], codes, int(keep), generator)
        whole = explore.decode(tokenizers[name], codes)
        return figures(name, [(whole, f"A, all {len(codes)} codes"), (image, f"the first {keep}")])

    def choose(name):
        n = tokenizers[name].config.latents
        return (
            gr.Slider(maximum=n - 1, value=0),
            gr.Slider(maximum=n - 1, value=n // 2 - 1),
            gr.Slider(maximum=n, value=n // 2),
        )

    quiet = {"show_progress": "minimal"}
    exchanged = exchange, [which, first_photo, second_photo, first, last], [swapped]
    cut = first_codes, [which, first_photo, keep, fill], [kept]
    photos = [first_photo.change, second_photo.change]
    answer([*photos, first.change, last.change], *exchanged, api_name="swap", **quiet)
    answer([first_photo.change, keep.change, fill.change], *cut, api_name="keep", **quiet)
    # Only then, because the sliders of the tokenizer before may be beyond this one's codes.
    chose = answer(which.change, choose, [which], [first, last, keep], api_name=False)
    answer(chose.then, *exchanged, api_name=False, **quiet)
    answer(chose.then, *cut, api_name=False, **quiet)


def _sampling_controls(generator: Any) -> list[Any]:
    """Controls of guidance, its schedule, the temperature, top-k and top-p."""
    default = explore.published_settings(generator)
    size = generator.config.codebook_size
    guidance = gr.Slider(1, 10, default.guidance, step=0.25, label="guidance (1: none)")
    temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="temperature")
    with gr.Accordion("More settings", open=False):
        names = list(get_args(Schedule))
        schedule = gr.Dropdown(names, value=default.schedule, label="schedule of guidance")
        top_k = gr.Slider(0, size, default.top_k, step=1, label="top-k (0: all codes)")
        top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="top-p")
    return [guidance, schedule, temperature, top_k, top_p]


def sample(session: Session) -> None:
    """Images of a class."""
    generators = session.models.generators
    if not generators:
        gr.Markdown(NO_GENERATOR)
        return
    default, _ = next(iter(generators.values()))
    names = list(explore.class_names(default))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            which = choice(generators, "Generator")
            label = gr.Dropdown(names, value=names[0], label="class")
            count = gr.Slider(1, MAX_SAMPLES, 8, step=1, label="images")
            controls = _sampling_controls(default)
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**32 - 1)
            with gr.Row():
                start = gr.Button("Sample", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(scale=5):
            state = gr.Markdown("Choose a class, then *Sample*.")
            images = gr.Gallery(
                label="Samples", columns=4, height=560, object_fit="contain", format="png"
            )

    def draw(which, label, count, seed, guidance, schedule, temperature, top_k, top_p):
        generator, own = generators[which]
        settings = dataclasses.replace(
            explore.published_settings(generator),  # when the schedule starts and ends
            guidance=guidance,
            schedule=schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        settings.check_schedule()
        drawn = explore.sample(
            generator,
            session.models.tokenizers[own],
            explore.class_names(generator)[label],
            settings,
            count=int(count),
            seed=int(seed or 0),
        )
        yield [], "drawing; the first call compiles"
        for images in drawn:
            yield list(map(enlarge, images)), f"{len(images)} of {int(count)} images"

    def change(which):
        generator, _ = generators[which]
        default, names = explore.published_settings(generator), list(explore.class_names(generator))
        return [
            gr.Dropdown(names, value=names[0]),
            gr.Slider(value=default.guidance),
            gr.Dropdown(value=default.schedule),
            gr.Slider(value=default.temperature),
            gr.Slider(value=default.top_k, maximum=generator.config.codebook_size),
            gr.Slider(value=default.top_p),
        ]

    event = answer(
        start.click,
        draw,
        [which, label, count, seed, *controls],
        [images, state],
        api_name="sample",
    )
    stop.click(lambda: "stopped", None, [state], cancels=[event], api_name=False)
    answer(which.change, change, [which], [label, *controls], api_name=False)


def complete(session: Session) -> None:
    """The first codes of a photo, and what a generator draws after them."""
    generators = session.models.generators
    if not generators:
        gr.Markdown(NO_GENERATOR)
        return
    default, _ = next(iter(generators.values()))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = photo("Photo")
            which = choice(generators, "Generator")
            n = default.config.codes
            keep = gr.Slider(0, n, n // 2, step=1, label="codes kept")
            classes = [NO_CLASS, *explore.class_names(default)]
            label = gr.Dropdown(classes, value=NO_CLASS, label="class")
            guidance = gr.Slider(1, 10, 1, step=0.25, label="guidance (needs a class)")
            usual = explore.published_settings(default).temperature
            temperature = gr.Slider(0, 2, usual, step=0.05, label="temperature")
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**32 - 1)
            start = gr.Button("Complete", variant="primary")
            examples([upload], session.drawings)
        with gr.Column(scale=5):
            results = gr.HTML(
                "Give a photo: the generator keeps the first of its codes and draws the others. In "
                "a 2D tokenizer the first codes are the top of the image; in a 1D tokenizer they "
                "belong to all of it."
            )

    def draw(which, path, keep, label, guidance, temperature, seed):
        if not path:
            raise UserError("expected a photo to complete")
        generator, own = generators[which]
        tokenizer, codes = session.models.tokenizers[own], session.codes(own, path)
        number, keep = explore.class_names(generator).get(label), min(int(keep), len(codes))
        first = [
            (session.image(own, path), "input"),
            (explore.decode(tokenizer, codes), f"all {len(codes)} codes"),
        ]
        completions = explore.sample(
            generator,
            tokenizer,
            generator.config.null_class if number is None else number,
            SamplingConfig(guidance=1.0 if number is None else guidance, temperature=temperature),
            count=COMPLETIONS,
            seed=int(seed or 0),
            codes=codes,
            keep=keep,
        )
        yield figures("drawing; the first call compiles", first)
        for images in completions:
            captions = [f"completion {i + 1}" for i in range(len(images))]
            heading = f"The first {keep} of {len(codes)} codes kept"
            drawn = figures(heading, list(zip(images, captions, strict=True)))
            yield figures(own, first) + drawn

    def change(which):
        generator, _ = generators[which]
        n = generator.config.codes
        classes = [NO_CLASS, *explore.class_names(generator)]
        usual = explore.published_settings(generator).temperature
        return [
            gr.Slider(maximum=n, value=n // 2),
            gr.Dropdown(classes, value=NO_CLASS),
            gr.Slider(value=usual),
        ]

    inputs = [which, upload, keep, label, guidance, temperature, seed]
    answer(start.click, draw, inputs, [results], api_name="complete")
    answer(which.change, change, [which], [keep, label, temperature], api_name=False)


def probe(blocks: gr.Blocks, reports: Path) -> None:
    """The reports below a folder."""

    def names():
        return explore.find_reports(reports) if reports.is_dir() else []

    def find():
        found = names()
        note = "" if found else f"No reports below `{reports}`: `--reports=DIR` names the folder."
        return gr.Dropdown(found, value=found[0] if found else None), note

    def show(name):
        if not name:
            return ""
        title, page = html.escape(name), html.escape(explore.read_report(reports, name))
        # In a sandbox, because a report may come from elsewhere.
        return f'<iframe class="report" title="{title}" sandbox srcdoc="{page}"></iframe>'

    with gr.Row():
        chosen = gr.Dropdown(names(), value=None, label="Report", scale=5)
        again = gr.Button("Look again", scale=1)
    note = gr.Markdown()
    page = gr.HTML()
    answer(chosen.change, show, [chosen], [page], api_name="report")
    answer([blocks.load, again.click], find, [], [chosen, note], api_name=False)
