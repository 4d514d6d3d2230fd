"""Projections onto convex sets, proximal operators and isotonic regression, differentiable to every order."""

from diffopt.convex.affine import projection_affine_set, projection_halfspace, projection_hyperplane
from diffopt.convex.arguments import ProjectionError
from diffopt.convex.balls import (
    projection_l1_ball,
    projection_l1_sphere,
    projection_l2_ball,
    projection_l2_sphere,
    projection_linf_ball,
)
from diffopt.convex.boxes import projection_box, projection_box_section, projection_non_negative
from diffopt.convex.cones import projection_psd_cone, projection_second_order_cone
from diffopt.convex.isotonic import isotonic_regression
from diffopt.convex.polyhedra import projection_polyhedron
from diffopt.convex.proxes import (
    prox_elastic_net,
    prox_from_projection,
    prox_group_lasso,
    prox_lasso,
    prox_non_negative_lasso,
    prox_non_negative_ridge,
    prox_none,
    prox_nuclear,
    prox_ridge,
)
from diffopt.convex.simplex import kl_projection_simplex, projection_simplex
from diffopt.convex.sinkhorn import kl_projection_birkhoff, kl_projection_transport
from diffopt.convex.transport import projection_birkhoff, projection_transport

__all__ = [
    "ProjectionError",
    "isotonic_regression",
    "kl_projection_birkhoff",
    "kl_projection_simplex",
    "kl_projection_transport",
    "projection_affine_set",
    "projection_birkhoff",
    "projection_box",
    "projection_box_section",
    "projection_halfspace",
    "projection_hyperplane",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_polyhedron",
    "projection_psd_cone",
    "projection_second_order_cone",
    "projection_simplex",
    "projection_transport",
    "prox_elastic_net",
    "prox_from_projection",
    "prox_group_lasso",
    "prox_lasso",
    "prox_non_negative_lasso",
    "prox_non_negative_ridge",
    "prox_none",
    "prox_nuclear",
    "prox_ridge",
]
