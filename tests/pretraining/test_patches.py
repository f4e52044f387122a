import numpy as np

from virst_jax.pretraining.patches import objects_of_patches, paths_in_words


def clip():
    """Four frames of 12 x 24 pixels, six bins of 2 x 4: the first object moves right, the second leaves after two."""
    labels = np.zeros((4, 12, 24), np.uint8)
    for t in range(4):
        labels[t, 2:4, 4 + 4 * t : 8 + 4 * t] = 1
    labels[:2, 10:12, 20:24] = 2
    return labels


def test_a_path_is_told_by_its_ends():
    assert paths_in_words(clip(), 3) == ["bhqt" + "08", "flrx" + "06", ""]


def test_an_image_has_places_alone():
    assert paths_in_words(clip()[:1], 2) == ["bh", "fl"]


def test_a_glimpse_is_not_an_end():
    labels = clip()
    labels[3, 10, 20] = 2  # an eighth of its area
    assert paths_in_words(labels, 2)[1] == "flrx" + "06"


def test_a_patch_shows_what_covers_most_of_it():
    labels = clip()
    labels[0, 2:4, 4:6] = 2  # half of the first object's patch, and more of the object than there is left
    labels[0, 2, 6] = 2
    labels[0, 0, 0] = 3  # an eighth of a patch
    labels[0, 0, 6:8] = 255
    found = objects_of_patches(labels, 255, 6)
    assert found.shape == (4, 36)
    assert found[0].nonzero()[0].tolist() == [0, 1, 7, 35]
    assert found[0][[0, 1, 7, 35]].tolist() == [3, 255, 2, 2]
    assert objects_of_patches(clip(), 2, 3)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 2]
    labels = np.zeros((1, 12, 24), np.uint8)
    labels[0, 0, 0] = 1
    assert objects_of_patches(labels, 1, 3)[0].tolist() == [2, *[0] * 8]  # too little to say, too much for nothing
