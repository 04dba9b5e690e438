"Packaging, read from settings.ini: the same facts that nbdev reads."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters="=")
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=["minisora"],
    package_data={"minisora": cfg["package_data"].split()},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "video": cfg["video_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["minisora=minisora._modidx:d"],
    },
    zip_safe=False,
)
