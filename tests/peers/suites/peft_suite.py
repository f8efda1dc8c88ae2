"""PEFT's tests of decoders and classifiers on one small model; `tests` is PEFT's in the process that runs this."""

from __future__ import annotations

import datasets
import peft.utils.constants as defaults

import hymba_tune  # noqa: F401  (registers Hymba with the Auto classes)
from tests import test_decoder_models, test_seq_classifier, test_token_classification_qa

for models in (
    test_decoder_models.PEFT_DECODER_MODELS_TO_TEST,
    test_decoder_models.SMALL_GRID_MODELS,
    test_seq_classifier.PEFT_SEQ_CLS_MODELS_TO_TEST,
    test_token_classification_qa.PEFT_TOKEN_CLS_MODELS_TO_TEST,
):
    models[:] = ["hymba"]  # a folder

QUOTES = [f"Quote {number} says that {number} cats are more than {number - 1}." for number in range(1, 21)]
test_decoder_models.load_dataset_english_quotes = lambda: datasets.DatasetDict(
    train=datasets.Dataset.from_dict({"quote": QUOTES})  # instead of one that the Hub has
)

# PEFT has no list of models to which one could add Hymba: users name the modules, and these tests rely on defaults.
SPECIAL = {
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": ["in_proj", "down_proj"],
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": ["down_proj"],
    "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING": ["input_layernorm", "final_layernorm"],
    "TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING": ["dt_proj.0"],  # the linear layer with a bias
}
for mapping_name, mapping in vars(defaults).items():
    if mapping_name.endswith("_MODULES_MAPPING"):
        mapping["hymba"] = SPECIAL.get(mapping_name, ["in_proj", "out_proj"])

TestDecoderModels = test_decoder_models.TestDecoderModels
TestSequenceClassificationModels = test_seq_classifier.TestSequenceClassificationModels
TestTokenClassificationModels = test_token_classification_qa.TestTokenClassificationModels
