"""One query encoded by itself is what it is in a set, but for rounding."""

import pytest
import torch

from helpers.pictures import paint
from helpers.tiny import MODEL
from rwkv_clip.factory import create_model, get_tokenizer, preprocess_of
from rwkv_clip.features import FeatureExtractor


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", None), ("fp32", torch.bfloat16), ("bf16", None)])
def test_a_query_is_as_in_a_set(precision, autocast):
    torch.manual_seed(0)
    net = create_model(MODEL, precision=precision).train()
    extractor = FeatureExtractor(net, preprocess_of(net), get_tokenizer(MODEL), autocast=autocast, workers=0)
    texts, pictures = ["a dog", "", "x" * 5000, "a cat on a mat"], [paint(40, 30, i) for i in range(4)]
    tolerance = 1e-5 if precision == "fp32" and autocast is None else 0.05
    for text, whole in zip(texts, extractor.encode_texts(texts)):
        found = extractor.encode_query(text)
        assert found.dtype == torch.float32 and abs(found.norm().item() - 1) < 1e-5
        torch.testing.assert_close(found, whole, atol=tolerance, rtol=0)
    for picture, whole in zip(pictures, extractor.encode_images(pictures.__getitem__, 4)):
        torch.testing.assert_close(extractor.encode_query(image=picture), whole, atol=tolerance, rtol=0)
    assert net.training
