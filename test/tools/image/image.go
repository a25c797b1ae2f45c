package main

import (
	"archive/tar"
	"bytes"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// kind is one of the images. It has the daemon, which it runs, and the tool for
// people; nothing else, above all no shell.
type kind struct {
	daemon string
	user   string
	title  string
}

func kinds() []kind {
	return []kind{
		{"assay-server", "65532:65532", "Assay server"},
		// It looks at processes of all users.
		{"assay-agent", "0:0", "Assay agent"},
	}
}

// index has the image of each build.
func (k kind) index(builds []build) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, b := range builds {
		image, err := k.image(b)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &b.platform}})
	}
	return index, nil
}

func (k kind) image(b build) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	made := v1.Time{Time: b.made}
	image, err := mutate.ConfigFile(image, &v1.ConfigFile{
		OS:           b.platform.OS,
		Architecture: b.platform.Architecture,
		Created:      made,
		RootFS:       v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       k.user,
			Entrypoint: []string{"/" + k.daemon},
			// So that kubectl exec finds assay by its name.
			Env:        []string{"PATH=/"},
			WorkingDir: "/",
			Labels:     k.labels(b),
		},
	})
	if err != nil {
		return nil, err
	}
	// A layer for each, since both images have the tool.
	for _, program := range []string{"assay", k.daemon} {
		layer, err := layer(filepath.Join(b.dir, program), b)
		if err != nil {
			return nil, err
		}
		image, err = mutate.Append(image, mutate.Addendum{Layer: layer, History: v1.History{Created: made, CreatedBy: "/" + program}})
		if err != nil {
			return nil, err
		}
	}
	return image, nil
}

func (k kind) labels(b build) map[string]string {
	labels := map[string]string{
		"title":    k.title,
		"version":  b.version,
		"revision": b.revision,
		"source":   "https://github.com/seed-caa81108/assay",
		"licenses": "Apache-2.0",
	}
	maps.DeleteFunc(labels, func(_, value string) bool { return value == "" })
	full := map[string]string{}
	for key, value := range labels {
		full["org.opencontainers.image."+key] = value
	}
	return full
}

// layer has one program. Owner, mode and time don't depend on the file's.
func layer(file string, b build) (v1.Layer, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	if err := w.WriteHeader(&tar.Header{
		Name: filepath.Base(file), Mode: 0o555, Size: int64(len(data)),
		Typeflag: tar.TypeReg, ModTime: b.made, Format: tar.FormatUSTAR,
	}); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}

// reference is the image's full name, as containerd and the kubelet have it.
func reference(repository, program, tag string, b build) (string, error) {
	if tag == "" {
		tag = strings.ReplaceAll(b.version, "+", "-") // a tag has no plus
	}
	full, err := name.NewTag(path.Join(repository, program) + ":" + tag)
	if err != nil {
		return "", err
	}
	if inner, ok := strings.CutPrefix(full.Name(), name.DefaultRegistry+"/"); ok {
		return "docker.io/" + inner, nil // where nobody names a registry
	}
	return full.Name(), nil
}
