"""Data parsers that nerfstudio finds through the entry points `nerfstudio.dataparser_configs`."""

from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from nerfstudio_softmining.plugin.llff_dataparser import LLFFDataParserConfig

llff = DataParserSpecification(
    config=LLFFDataParserConfig(),
    description="Scenes in the LLFF layout: poses_bounds.npy beside images/, images_4/, images_8/, ...",
)
