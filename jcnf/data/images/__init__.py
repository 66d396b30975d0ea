"""Images: data sets, files, dequantizing, and images as planar densities."""

from jcnf.data.images.density import MAX_SIDE as MAX_SIDE
from jcnf.data.images.density import image_density as image_density
from jcnf.data.images.density import piecewise_constant as piecewise_constant
from jcnf.data.images.density import read_image_file as read_image_file
from jcnf.data.images.density import render_text as render_text
from jcnf.data.images.digits import load_digits_parts as load_digits_parts
from jcnf.data.images.digits import load_digits_table as load_digits_table
from jcnf.data.images.pixels import dequantize as dequantize
from jcnf.data.images.sets import Images as Images
from jcnf.data.images.sets import load_images as load_images
from jcnf.data.images.sets import read_images as read_images
from jcnf.data.images.sets import shape_of as shape_of
