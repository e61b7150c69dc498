"""Which family a model is of, and what is asked of it."""

import pytest
from membrane.core.errors import ErasureError
from membrane.core.families import table, unet
from membrane.core.families.family import Family, TextEntry


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (("SD15", "BASE", "object"), unet.SD1),
        (("PixelWorld", "SD15", "BASE", "object"), unet.SD1),
        (("SD21UnclipL", "SD20", "BASE", "object"), unet.SD2),
        (("SSD1B", "SDXL", "BASE", "object"), unet.SDXL),
        (("SDXLRefiner", "BASE", "object"), unet.SDXL),
        (("SomethingNew", "BASE", "object"), table.UNKNOWN),
    ],
)
def test_a_configuration_is_of_the_nearest_family_it_is_derived_from(configs, expected):
    assert table.family_of(configs) is expected


def test_a_family_that_is_registered_is_looked_at_first():
    own = Family("own", "Own", ("SD15",), (TextEntry("text", "cross_attn", "c_crossattn", ("txt_in",)),))
    table.register(own)
    try:
        assert table.family_of(("SD15",)) is own
    finally:
        table.FAMILIES.remove(own)
    assert table.family_of(("SD15",)) is unet.SD1


def test_a_family_without_a_text_entry_says_why():
    own = Family("own", "Own", ("Own",), (), refused="its text enters as token ids")
    with pytest.raises(ErasureError, match="text of Own models cannot be erased: its text enters as token ids"):
        own.text  # noqa: B018  the property raises


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("HiDreamO1", "The text of HiDream-O1 models cannot be erased: it enters as token ids of the language model"),
        ("Stable_Cascade_B", "The text of Stable Cascade B models cannot be erased: this stage only sharpens"),
    ],
)
def test_families_whose_text_cannot_be_erased_are_refused_by_name(config, sentence):
    with pytest.raises(ErasureError, match=sentence):
        table.family_of((config, "BASE", "object")).text  # noqa: B018  the property raises


def test_entries_know_their_readers():
    assert unet.TEXT.reads("input_blocks.1.1.transformer_blocks.0.attn2.to_k")
    assert not unet.TEXT.reads("input_blocks.1.1.transformer_blocks.0.attn1.to_k")
    assert [entry.name for entry in unet.SDXL.entries] == ["text", "pooled"] and unet.SD2.entries == (unet.TEXT,)


def test_families_are_told_by_the_width_of_their_text():
    assert [table.by_text_width(width).title for width in (768, 1024, 2048)] == [
        "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL",
    ]  # fmt: skip
    assert table.by_text_width(4096) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SD15", ("sd_v1", "stable-diffusion-v1")),
        ("SD20", ("sd_v2", "stable-diffusion-v2-512")),
        ("SDXL", ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")),
        ("SDXLRefiner", ("", "stable-diffusion-xl-v1-refiner")),
        ("Flux", ("flux1", "flux-1-dev")),
        ("FluxSchnell", ("flux1", "flux-1-schnell")),
        ("GenmoMochi", ("", "GenmoMochi")),
        ("", ("", "unknown")),
    ],
)
def test_what_lora_files_call_a_family(name, expected):
    assert table.architecture(name) == expected
