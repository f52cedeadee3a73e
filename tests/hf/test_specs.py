import pytest
import torch

from fast_transformers.feature_maps import ActivationFunctionFeatureMap, Favor
from fast_transformers.specs import FEATURE_MAPS, parse_feature_map, register_feature_map


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        ("elu", 8),
        ("relu", 8),
        ("relu:", 8),
        ("rff", 8),
        ("smoothed-rff:n_dims=9", 9),
        ("favor:n_dims=64,redraw=100", 64),
        ("favor: n_dims = 6, orthogonal = False", 6),
        ("generalized:n_dims=5", 5),
        ("favor:n_dims=256,projection=simplex", 256),
        ("oprf:n_dims=32,projection='qmc'", 32),
        ("derf:n_dims=32,mode=sderf,heads=4", 32),
        ("polysketch:sketch=4,degree=8", 10),
        ("exp:scale=0.5", 8),
        ("lln", 8),
        ("dpfp:nu=3", 48),
        ("taylor", 45),
        ("poly:degree=3", 120),
        ("rebased:beta=1", 36),
        ("t2r:n_dims=5,heads=2", 5),
        ("hedgehog:normalize=joint", 16),
        ("centered:inner='derf:n_dims=64,heads=2',heads=2", 64),
        ("projected:dim=3", 10),
        ("projected:inner=dpfp,dim=3", 6),
        ("cos", 16),
        ("normalized:inner=relu,norm=l1", 8),
        ("cos:inner='favor:n_dims=32',max_length=100", 64),
        ("concat:inners=['elu','favor:n_dims=32'],weights=[0.5,2]", 40),
    ],
)
def test_makes_the_map(spec, features):
    feature_map = parse_feature_map(spec)(8)
    assert feature_map.feature_dims == features
    assert feature_map.query_dimensions == 8


def test_options_arrive():
    favor = parse_feature_map("favor:n_dims=64,redraw=100,softmax_temp=0.5")(8)
    assert isinstance(favor, Favor)
    assert (favor.redraw, favor.softmax_temp) == (100, 0.5)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("favour", "did you mean 'favor'"),
        ("", "unknown feature map ''"),
        ("favor:dims=3", "its options are n_dims, softmax_temp"),
        ("elu:n_dims=3", "it has no options"),
        ("favor:n_dims", "cannot be read"),
        ("favor:n_dims=", "cannot be read"),
        ("favor:n_dims=1,n_dims=2", "cannot be read"),
        ("favor:**{'n_dims': 2}", "cannot be read"),
        ("favor:3", "cannot be read"),
        ("favor:n_dims=2)+(3", "cannot be read"),
        ("favor:n_dims=__import__('os').getpid()", "cannot be read"),
        ("favor:projection=a.b", "cannot be read"),
        ("favor:projection=a+b", "cannot be read"),
        ("dpfp:nu=1000000000", "nu must be at most 65536"),
        ("centered:inner=favour", "did you mean 'favor'"),
        ("concat:inners=['elu','rlu']", "did you mean 'relu'"),
        ("favor:n_dims=\0", "cannot be read"),
        ("favor:n_dims=" + "(" * 400, "cannot be read"),
        ("favor:n_dims=" + "9" * 600, "NAME"),
        ("favor:n_dims=1000000000", "at most 65536"),
        (None, "NAME"),
    ],
)
def test_refuses(spec, text):
    with pytest.raises(ValueError, match=r"feature map|n_dims") as error:
        parse_feature_map(spec)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        "favor:n_dims=7",
        "favor:n_dims='x'",
        "favor:n_dims=x",
        "rff:redraw=0",
        "favor:projection=orf",
    ],
)
def test_a_map_that_refuses_its_options_is_a_value_error(spec):
    with pytest.raises(ValueError, match=r"feature map ['\"](favor|rff):"):
        parse_feature_map(spec)(8)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("poly:degree=60", "products, more than 262144"),
        ("polysketch:sketch=60000", "products, more than"),
        ("dpfp:nu=10000", "must be 1..127"),
        ("concat:inners=['favor:n_dims=40000','favor:n_dims=40000']", "80000 features, more than"),
        ("centered:inner=elu", "softmax kernel"),
        ("centered:inner='cos:inner=relu'", "must be outermost"),
        ("concat", "missing 1 required positional argument: 'inners'"),
    ],
)
def test_sizes_and_nestings_that_are_refused(spec, text):
    with pytest.raises(ValueError, match="feature map") as error:
        parse_feature_map(spec)(64)
    assert text in str(error.value)


def test_registered_map(monkeypatch):
    monkeypatch.setattr("fast_transformers.specs.FEATURE_MAPS", dict(FEATURE_MAPS))

    def power(query_dimensions, exponent=2):
        return ActivationFunctionFeatureMap(query_dimensions, lambda x: x.relu() ** exponent)

    register_feature_map("power", power)
    x = torch.tensor([1.0, -2.0, 3.0])
    assert parse_feature_map("power:exponent=3")(3)(x).tolist() == [1.0, 0.0, 27.0]
    with pytest.raises(ValueError, match="its options are exponent"):
        parse_feature_map("power:n=3")
    with pytest.raises(ValueError, match="letters"):
        register_feature_map("a:b", power)
    with pytest.raises(TypeError, match="a factory"):
        register_feature_map("three", 3)
