package reference

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
)

// module is the import path of the project.
const module = "github.com/seed-caa81108/assay/"

// Key is one key of a configuration file.
type Key struct {
	Name string // from the top, such as ca.root_ttl
	Type string // in words
	Text string // the manual: the field's comment
	// Below are the keys of a section.
	Below []Key
}

// Config reads the keys of a configuration from the Go type that it is decoded
// into, in the order in which the type has them.
func Config(root, dir, typeName string) ([]Key, error) {
	r := &configReader{root: root, packages: map[string]*sourcePackage{}}
	p, err := r.load(dir)
	if err != nil {
		return nil, err
	}
	spec, ok := p.types[typeName]
	if !ok {
		return nil, fmt.Errorf("%s has no type %s", dir, typeName)
	}
	return r.structure("", p, spec)
}

type configReader struct {
	root     string
	packages map[string]*sourcePackage
}

// sourcePackage is the types of a package, with what its files import.
type sourcePackage struct {
	dir     string
	types   map[string]*ast.TypeSpec
	imports map[string]string // name to path
}

func (r *configReader) load(dir string) (*sourcePackage, error) {
	if p := r.packages[dir]; p != nil {
		return p, nil
	}
	p := &sourcePackage{dir: dir, types: map[string]*ast.TypeSpec{}, imports: map[string]string{}}
	names, err := filepath.Glob(filepath.Join(r.root, dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		for _, imp := range file.Imports {
			p.imports[importName(imp)], _ = strconv.Unquote(imp.Path.Value)
		}
		for _, decl := range file.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range gen.Specs {
				if spec, ok := spec.(*ast.TypeSpec); ok {
					p.types[spec.Name.Name] = spec
				}
			}
		}
	}
	r.packages[dir] = p
	return p, nil
}

// importName is the name by which a file knows an import.
func importName(imp *ast.ImportSpec) string {
	if imp.Name != nil {
		return imp.Name.Name
	}
	path, _ := strconv.Unquote(imp.Path.Value)
	return path[strings.LastIndex(path, "/")+1:]
}

// structure lists the keys of a struct, each with what is below it.
func (r *configReader) structure(above string, p *sourcePackage, spec *ast.TypeSpec) ([]Key, error) {
	structure, ok := spec.Type.(*ast.StructType)
	if !ok {
		return nil, fmt.Errorf("%s: %s.%s is no struct", strings.TrimSuffix(above, "."), p.dir, spec.Name.Name)
	}
	var keys []Key
	for _, field := range structure.Fields.List {
		yaml, ok := yamlName(field)
		if !ok {
			continue
		}
		if len(field.Names) != 1 {
			return nil, fmt.Errorf("%s.%s has fields without a comment of their own", p.dir, spec.Name.Name)
		}
		name := above + yaml
		text, err := manual(name, field)
		if err != nil {
			return nil, err
		}
		words, below, err := r.value(name, p, field.Type)
		if err != nil {
			return nil, err
		}
		keys = append(keys, Key{Name: name, Type: words, Text: text, Below: below})
	}
	return keys, nil
}

func yamlName(field *ast.Field) (string, bool) {
	if field.Tag == nil {
		return "", false
	}
	tag, err := strconv.Unquote(field.Tag.Value)
	name, _, _ := strings.Cut(reflect.StructTag(tag).Get("yaml"), ",")
	return name, err == nil && name != "" && name != "-"
}

// manual is the comment of a field after the field's name.
func manual(key string, field *ast.Field) (string, error) {
	name, text := field.Names[0].Name, sentence(field.Doc.Text())
	rest, ok := strings.CutPrefix(text, name)
	if !ok || rest == "" || !strings.ContainsAny(rest[:1], " ,") {
		return "", fmt.Errorf("the comment of %s has to begin with the field's name, %s: it is the manual of the key", key, name)
	}
	return rest, nil
}

// value says in words what a key takes, and lists the keys below it.
func (r *configReader) value(name string, p *sourcePackage, t ast.Expr) (words string, below []Key, err error) {
	switch t := t.(type) {
	case *ast.StarExpr:
		return r.value(name, p, t.X)
	case *ast.ArrayType:
		words, below, err = r.value(name+"[]", p, t.Elt)
		return "list of " + plural(words), below, err
	case *ast.MapType:
		words, below, err = r.value(name+".NAME", p, t.Value)
		return "names, each with " + words, below, err
	case *ast.SelectorExpr:
		pkg := p.imports[t.X.(*ast.Ident).Name]
		if pkg == "time" && t.Sel.Name == "Duration" {
			return "duration", nil, nil
		}
		dir, ours := strings.CutPrefix(pkg, module)
		if !ours {
			return "", nil, fmt.Errorf("%s: no words for a %s.%s", name, pkg, t.Sel.Name)
		}
		other, err := r.load(dir)
		if err != nil {
			return "", nil, err
		}
		return r.value(name, other, t.Sel)
	case *ast.Ident:
		if words := basic[t.Name]; words != "" {
			return words, nil, nil
		}
		spec, ok := p.types[t.Name]
		if !ok {
			return "", nil, fmt.Errorf("%s: no words for a %s", name, t.Name)
		}
		if _, ok := spec.Type.(*ast.StructType); !ok {
			return r.value(name, p, spec.Type)
		}
		below, err = r.structure(name+".", p, spec)
		return "section", below, err
	}
	return "", nil, fmt.Errorf("%s: no words for a %T", name, t)
}

var basic = map[string]string{
	"string": "text", "bool": "true or false",
	"int": "number", "int32": "number", "int64": "number", "uint": "number", "uint16": "number", "uint32": "number", "uint64": "number",
	"float64": "number",
}

func plural(words string) string {
	switch words {
	case "text":
		return "texts"
	default:
		return words + "s"
	}
}

// sentence puts a comment into one line.
func sentence(comment string) string { return strings.Join(strings.Fields(comment), " ") }

// ConfigPage is the page of a configuration file.
func ConfigPage(program, file string, keys []Key) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# %s

Every key of the configuration of %s, in YAML. Defaults are meant to work: what is not said here to be mandatory can be
left out. A key that is not here, or a value that can't be honoured, stops the start with a message that names line and
key; %s tells the same without starting anything. Durations are written as in Go: 90s, 12h, 168h.
`, file, "`"+program+"`", "`"+program+" validate`")
	writeKeys(&b, "##", keys)
	return b.String()
}

// writeKeys lists the keys that have a value, then the sections.
func writeKeys(b *strings.Builder, heading string, keys []Key) {
	b.WriteString("\n")
	for _, k := range keys {
		if k.Below == nil {
			fmt.Fprintf(b, "- `%s` (%s)%s\n", k.Name, k.Type, k.Text)
		}
	}
	for _, k := range keys {
		if k.Below == nil {
			continue
		}
		fmt.Fprintf(b, "\n%s %s\n\n`%s`%s\n", heading, k.Name, k.Name, k.Text)
		if k.Type != "section" {
			fmt.Fprintf(b, "\nIt is a %s.\n", k.Type)
		}
		writeKeys(b, heading+"#", k.Below)
	}
}
